"""docs/quality.md: what the judge sees, what it says of the built-in model, and the study."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.pages.builtin import size_of
from benchmarks.pages.paired import interval
from nabla_attn.evaluation.records import METRICS, Records, read_records
from nabla_attn.record import RunRecord
from nabla_attn.viz.document import Block, Picture, Section, Table, Text, write_markdown
from nabla_attn.viz.report import build_report

TITLE = "Quality of the built-in model"
EYE = (
    "The judge of the moving-shapes world reads a video back into facts without a learned model. A "
    "shape is of its kind where a person would say so: it overlaps with the best-fitting ideal "
    "shape (position and size are fitted; shapes of this world are not turned) by at least 0.92 in "
    "the mean over the frames and by 0.85 in the worst one, leads the next kind by 0.06, and has "
    "no holes, fragments or stains of more than 2 % of its area each. The limits were set by "
    "looking at these pictures: overlap in the mean and in the worst frame, and the verdict."
)
BEFORE = (
    "The first judge of this model asked for an overlap of 0.7 with an ellipse, a rectangle or a "
    "triangle of any proportions, in the median frame, and took blobs for circles. Both judges "
    "read the same videos here; the first is that of records without a judge's name, and its code "
    "is in the history of judge.py. All right means everything that the prompt says, by the first "
    "judge and by the present one. Outline, worst frame, fragments and stains are means over the "
    "videos. Videos of 128x128 are the first built-in model's, which the present one replaces; the "
    "studies further down are all of that one."
)
FIRST_MODEL = "first_model"
"""Folder of the first built-in model's records, in that of all."""

LIMITS = (
    "Mean overlap of the shape with its best fit, and that of the worst frame, for true clips that "
    "only went through the VAE, and for videos of the transformer with dense attention. Single "
    "frames are sampled at the noise levels that the model learnt them with."
)

ESTIMATED = (
    "Held-out prompts as in the study below, one seed each, judged by the present judge. Pairs "
    "kept leave out summaries, which are at most another 1/64 of all pairs. Two processes of one "
    "thread ran side by side, so seconds tell ratios only."
)
BEFORE_TAILS = "nabla-0.2_sta-3-3-3"
"""What `nabla generate` took before this study, which others are compared with."""

PAIRED = (
    f"Differences to `{BEFORE_TAILS}`, prompt by prompt, with the 95 % interval of the mean by "
    "Student's t; seconds in the transformer as a median of ratios. Right but for the shape: "
    "number, colour, direction, size and background are."
)
BUT_SHAPE = ("number", "colour", "direction", "size", "background")

LOOKED_AT = ("ssim", "outline")
STEPS = (
    "Steps are counted from 0; where a tail does not work, dropped blocks are left out. SSIM to "
    "dense attention, its difference to the same video without a tail, and outline: means over the "
    "prompts, with the 95 % interval of the difference by Student's t."
)


def write_page(path: Path, records: Path) -> None:
    """Write the page and its pictures.

    Args:
        path: The Markdown file.
        records: The folder of the records.
    """
    sections = _eye(path, records)
    if (tails := records / "quality_tails").is_dir():
        sections.append(_estimated(tails))
    if (steps := records / "tail_steps.json").is_file():
        sections.append(_steps(RunRecord.load(steps)))
    write_markdown(TITLE, [*sections, *_study(records / "quality")], path)


def _eye(path: Path, records: Path) -> list[Section]:
    pictures = path.parent / f"{path.stem}-images"
    blocks: list[Block] = [Text(EYE)]
    if (sheet := pictures / "judge.png").is_file():
        blocks.append(Picture("judge", "What passes and what does not", sheet.read_bytes()))
    sections = [Section("What the judge sees", blocks)]
    folders = (records, records / FIRST_MODEL)
    if judged := _load(folders, "judge-*_*_*.json"):
        sections.append(Section("The model, by both judges", [Text(BEFORE), _judged(judged)]))
    if measured := _load(folders, "outline_limits.json"):
        limits: list[Block] = [Text(LIMITS)]
        for record in measured:
            rows = record.numbers["rows"]
            size = Text(f"At {size_of(record.config)}:")
            limits += [size, _limits(rows), Text(_conclusion(rows))]
        sections.append(Section("What limits outlines", limits))
    return sections


def _load(folders: Sequence[Path], pattern: str) -> list[RunRecord]:
    paths = [path for folder in folders for path in sorted(folder.glob(pattern))]
    return [RunRecord.load(path) for path in paths]


def _judged(records: Sequence[RunRecord]) -> Table:
    header = (
        "size", "algorithm", "captions", "videos", "pairs kept", "all right, first judge",
        "all right", "shape, first judge", "shape", "direction", "outline", "worst frame",
        "fragments", "stains",
    )  # fmt: skip
    rows = []
    for record in sorted(records, key=_by_size):
        summary, prompts = record.numbers["summary"], record.numbers["prompts"]
        right = summary["right"]
        name = record.config["sparse_algo"] + ", adapters" * ("lora" in record.config)
        first = [prompt.get("first_judge") for prompt in prompts]
        cells = [
            size_of(record.config),
            name,
            record.config["captions"],
            str(len(prompts)),
            f"{summary['density']:.1%}",
        ]
        cells += [_share([each and all(each.values()) for each in first])]
        cells += [_share([_is_all_right(prompt["right"]) for prompt in prompts])]
        cells += [_share([each and each["shape"] for each in first])]
        cells += [f"{right['shape']:.0%}", f"{right['direction']:.0%}"]
        cells += [f"{right['outline']:.3f}", f"{right['outline_min']:.3f}"]
        cells += [f"{right['fragments']:.1%}", f"{right['stains']:.1%}"]
        rows.append(tuple(cells))
    return Table(header, tuple(rows))


def _by_size(record: RunRecord) -> tuple[int, float]:
    """The largest videos first, then those of most pairs."""
    return -record.config["height"], -record.numbers["summary"]["density"]


def _share(values: Sequence[bool | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.fmean(known):.0%}" if len(known) == len(values) else ""


def _is_all_right(right: dict[str, Any]) -> bool:
    return all(value for value in right.values() if isinstance(value, bool))


def _limits(rows: Sequence[dict[str, Any]]) -> Table:
    header = (
        "video", "captions", "frames", "steps", "videos", "outline", "worst frame", "shape right",
        "PSNR, dB",
    )  # fmt: skip
    cells = [
        (
            row["name"], row["captions"], str(row["frames"]), str(row["steps"] or ""),
            str(row["count"]), f"{row['outline']:.3f}", f"{row['outline_min']:.3f}",
            f"{row['shape']:.0%}", f"{row['psnr']:.1f}" if "psnr" in row else "",
        )
        for row in rows
    ]  # fmt: skip
    return Table(header, tuple(cells))


def _conclusion(rows: Sequence[dict[str, Any]]) -> str:
    """What the rows say, in numbers only."""
    vae = [row["outline"] for row in rows if not row["steps"]]
    lost = []
    for frames in sorted({row["frames"] for row in rows if row["steps"]}):
        found = {
            which: statistics.fmean(
                row["outline"] for row in rows if _is_of(row, frames, which) and row["steps"]
            )
            for which in ("trained", "held-out")
            if any(_is_of(row, frames, which) and row["steps"] for row in rows)
        }
        means = ", ".join(f"{value:.3f} {which}" for which, value in found.items())
        lost.append(f"{frames} frame{'s' * (frames > 1)}: {means}")
    return (
        f"Through the VAE alone the overlap is {min(vae):.3f} to {max(vae):.3f}. Generated, in the "
        f"mean over all numbers of steps: {'; '.join(lost)}."
    )


def _is_of(row: dict[str, Any], frames: int, captions: str) -> bool:
    return bool(row["frames"] == frames and row["captions"] == captions)


def _estimated(run: Path) -> Section:
    """The study of tails as one section."""
    sections = {section.title: section.blocks for section in build_report([run])}
    pictures = [
        replace(block, name=f"tails-{block.name}")
        for block in (*sections["Curves"], *sections["Videos"])
        if isinstance(block, Picture)
    ]
    blocks = [Text(ESTIMATED), *sections["Verdict"], *sections["Results"]]
    blocks += [Text(PAIRED), _paired(read_records(run)), *pictures]
    return Section("Dropped blocks estimated", blocks)


def _paired(records: Records) -> Table:
    header = ("algorithm", "pairs kept", "right but for the shape", "SSIM", "outline", "seconds")
    rows = []
    for algorithm in sorted(records):
        pairs = [
            (record, records[BEFORE_TAILS][item])
            for item, record in records[algorithm].items()
            if item in records[BEFORE_TAILS]
        ]
        density = statistics.fmean(mine.numbers["attention"]["density"] for mine, _ in pairs)
        right = statistics.fmean(
            all(METRICS[f"judge_{name}"](mine) for name in BUT_SHAPE) for mine, _ in pairs
        )
        cells = [algorithm, f"{density:.1%}", f"{right:.1%}"]
        for metric in ("ssim", "judge_outline"):
            cells.append(_apart([_read(m, metric) - _read(o, metric) for m, o in pairs]))
        ratios = [_read(mine, "seconds") / _read(other, "seconds") for mine, other in pairs]
        rows.append((*cells, f"{statistics.median(ratios):.2f}"))
    return Table(header, tuple(rows))


def _read(record: RunRecord, metric: str) -> float:
    value = METRICS[metric](record)
    assert value is not None, f"the study measured {metric}"
    return value


def _apart(differences: Sequence[float]) -> str:
    """Their mean and its interval."""
    low, high = interval(differences) or (float("nan"),) * 2
    return f"{statistics.fmean(differences):+.3f} [{low:+.3f}, {high:+.3f}]"


def _steps(record: RunRecord) -> Section:
    """At which steps a tail helps and harms."""
    prompts = [prompt["rows"] for prompt in record.numbers["results"]]
    cells = []
    for name in prompts[0]:
        apart = [rows[name]["ssim"] - rows["no tail"]["ssim"] for rows in prompts]
        means = (statistics.fmean(rows[name][key] for rows in prompts) for key in LOOKED_AT)
        ssim, outline = (f"{mean:.3f}" for mean in means)
        is_base = name in ("dense", "no tail")
        cells.append((name, ssim, "" if is_base else _apart(apart), outline))
    table = Table(("tail of topk-0.1", "SSIM", "to no tail", "outline"), tuple(cells))
    size = "x".join(str(record.config[side]) for side in ("width", "height"))
    text = f"{len(prompts)} held-out prompts, {size}, {record.config['frames']} frames. {STEPS}"
    return Section("When a tail helps", [Text(text), table])


def _study(run: Path) -> list[Section]:
    """The report of the study, whose records are of the first judge."""
    return [
        replace(section, title="Verdict of the first judge")
        if section.title == "Verdict"
        else section
        for section in build_report([run])
    ]
