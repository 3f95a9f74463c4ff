"""A report of runs from their records alone: the same records give the same bytes."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nabla_attn.evaluation.curves import draw_curves, draw_true_mass, mean_maps
from nabla_attn.evaluation.records import FACTS, Records, judge_version, read_records, summarise
from nabla_attn.media import read_video
from nabla_attn.record import RunRecord
from nabla_attn.schedule import Schedule
from nabla_attn.viz.contact_sheet import draw_contact_sheet
from nabla_attn.viz.document import Block, Clip, Picture, Section, Table, Text, Videos
from nabla_attn.viz.verdict import judge_run, judge_votes

MAX_SHEET_ROWS = 7
MAX_VIDEO_BYTES = 30_000_000
"""Bytes of all mp4 files that a page holds; further videos are named."""
COLUMNS: dict[str, tuple[str, str]] = {
    "density": ("pairs kept", "{:.1%}"),
    "seconds": ("seconds", "{:.2f}"),
    "memory_bytes": ("memory, MB", "{:.0f}"),
    "psnr": ("PSNR, dB", "{:.2f}"),
    "ssim": ("SSIM", "{:.4f}"),
    "motion_psnr": ("motion PSNR, dB", "{:.2f}"),
    "lpips": ("LPIPS", "{:.4f}"),
    "clip": ("CLIP", "{:.2f}"),
}
JUDGE: dict[str, tuple[str, str]] = {
    **{f"judge_{name}": (name, "{:.1%}") for name in ("all", *FACTS)},
    "judge_outline": ("outline", "{:.3f}"),
    "judge_outline_min": ("worst frame", "{:.3f}"),
    **{f"judge_{name}": (name, "{:.1%}") for name in ("holes", "fragments", "stains")},
}
JUDGE_NOTES = {
    "1": " It took any blob that is about as wide and high as the asked shape for that shape, so "
    "“shape” and “all” are far too high: see the judge's second version.",
    "2": " Outline is the overlap with the best-fitting shape of the asked kind, in the mean and "
    "in the worst frame; holes, fragments and stains are shares of the shape's area.",
}
"""What a reader must know of each version of the judge."""
LOSSES: dict[str, tuple[str, str]] = {
    "probe_density": ("pairs kept", "{:.1%}"),
    "kept_mass": ("mass in the pooled map", "{:.1%}"),
    "true_mass": ("true mass", "{:.1%}"),
    "best_mass": ("best possible", "{:.1%}"),
    "output_error": ("output error", "{:.3f}"),
}
SETTINGS = ("model", "height", "width", "frames", "steps", "guidance", "dtype", "device")


def build_report(runs: Sequence[str | Path]) -> list[Section]:
    """Return the sections of a report.

    Args:
        runs: Folders of `nabla evaluate`, and folders with a record of `nabla vote results`.

    Raises:
        ValueError: A folder is neither.
    """
    sections = []
    for run in map(Path, runs):
        votes = run / "results.json"
        if votes.is_file():
            sections += _vote_sections(RunRecord.load(votes))
        else:
            sections += _evaluation_sections(read_records(run), run)
    return sections


def _evaluation_sections(records: Records, run: Path) -> list[Section]:
    summary = summarise(records)
    verdict = Section("Verdict", [Text(judge_run(summary), is_lead=True)])
    sections = [verdict, _videos(records, run), _results(summary, judge_version(records))]
    if len(summary) > 1:
        curves = _draw(lambda path: draw_curves(summary, path))
        caption = "Quality against token pairs kept and against seconds; bars are 95 % intervals"
        sections.append(Section("Curves", [Picture("curves", caption, curves)]))
    if mean_maps(records, "true_mass"):
        sections.append(_losses(records, summary))
    return [*sections, _settings(records), _environment(records)]


def _settings(records: Records) -> Section:
    first = next(iter(records["dense"].values()))
    prompts = {str(record.config["prompt"]) for record in records["dense"].values()}
    seeds = sorted({record.seed for record in records["dense"].values()})
    rows = [(name, str(first.config.get(name, ""))) for name in SETTINGS]
    rows.append(("schedule", _schedules(records)))
    rows += [("prompts", str(len(prompts))), ("seeds", ", ".join(map(str, seeds)))]
    rows += [("algorithms", ", ".join(records)), ("machine", first.device)]
    return Section("Settings", [Table(("setting", "value"), tuple(rows))])


def _schedules(records: Records) -> str:
    """Return the rules of the schedules, with their algorithms where they differ."""
    owners: dict[str, list[str]] = {}
    for algo, items in records.items():
        if algo != "dense":
            given = next(iter(items.values())).config.get("schedule")
            schedule = Schedule.from_dict(given) if given else Schedule.default(algo)
            rules = str(schedule).removeprefix(str(schedule.algorithm)).removeprefix("; ")
            owners.setdefault(rules or "sparse from the first step", []).append(algo)
    if len(owners) == 1:
        return next(iter(owners))
    return "; ".join(f"{', '.join(algos)}: {rules}" for rules, algos in owners.items())


def _results(summary: dict[str, dict[str, Any]], version: str) -> Section:
    blocks: list[Block] = [
        Text(
            "Mean over videos (seconds: median) and, in brackets, the 95 % bootstrap interval over "
            "prompts. PSNR and SSIM compare with dense attention from the same noise; PSNR is of "
            "the mean squared error; motion is the same of frame differences."
        ),
        _table(summary, COLUMNS),
    ]
    if any("judge_all" in metrics for metrics in summary.values()):
        blocks += [
            Text(
                "Share of videos that show what the prompt says, read back by version "
                f"{version} of the judge of the moving-shapes world, and the paired difference to "
                f"dense of “all”.{JUDGE_NOTES.get(version, '')}"
            ),
            _table(summary, JUDGE, difference="judge_all"),
        ]
    return Section("Results", blocks)


def _losses(records: Records, summary: dict[str, dict[str, Any]]) -> Section:
    rows = []
    for algo, steps in mean_maps(records, "true_mass").items():
        per_step = [sum(row) / len(row) for row in steps]
        per_layer = [sum(column) / len(column) for column in zip(*steps, strict=True)]
        step, layer = per_step.index(min(per_step)), per_layer.index(min(per_layer))
        rows.append((algo, f"{step} ({per_step[step]:.1%})", f"{layer} ({per_layer[layer]:.1%})"))
    probed = {algo: metrics for algo, metrics in summary.items() if "true_mass" in metrics}
    picture = _draw(lambda path: draw_true_mass(records, path))
    return Section(
        "Where recall is lost",
        [
            Text(
                "From exact attention on sampled query tokens of every step, layer and head. True "
                "mass is the attention that the kept blocks really hold; best possible is the most "
                "that as many blocks could hold, chosen for each token."
            ),
            _table(probed, LOSSES),
            Table(("algorithm", "worst step (true mass)", "worst layer (true mass)"), tuple(rows)),
            Picture("losses", "True attention mass kept, by step and layer", picture),
        ],
    )


def _videos(records: Records, run: Path) -> Section:
    first = sorted(records["dense"])[0]
    algos = ["dense", *sorted(records.keys() - {"dense"})]
    files = {algo: run / algo / f"{first}.mp4" for algo in algos}
    clips: list[Clip] = []
    for algo in algos:
        mp4 = files[algo].read_bytes()
        if sum(len(clip.mp4) for clip in clips) + len(mp4) > MAX_VIDEO_BYTES:
            break
        clips.append(Clip(algo, _note(records[algo][first]), mp4))
    rows = algos[:MAX_SHEET_ROWS]
    videos = [(read_video(files[algo]), records[algo][first]) for algo in rows]
    sheet = _draw(lambda path: draw_contact_sheet(videos, path))
    prompt = records["dense"][first].config["prompt"]
    text = f"“{prompt}”, from the same noise.{_left_out(algos, len(clips))}"
    caption = f"Frames, and the share of pairs kept by step and layer.{_left_out(algos, len(rows))}"
    blocks: list[Block] = [Text(text), Videos(tuple(clips)), Picture("videos", caption, sheet)]
    return Section("Videos", blocks)


def _note(record: RunRecord) -> str:
    if record.config["sparse_algo"] == "dense":
        return "every pair"
    kept, ssim = record.numbers["attention"]["density"], record.numbers["to_dense"]["ssim"]
    return f"{kept:.0%} of pairs, SSIM {ssim:.3f}"


def _left_out(algos: Sequence[str], count: int) -> str:
    return f" Not shown: {', '.join(algos[count:])}." if len(algos) > count else ""


def _environment(records: Records) -> Section:
    found: dict[str, set[str]] = {}
    for items in records.values():
        for record in items.values():
            for name, version in record.versions.items():
                found.setdefault(name, set()).add(version)
    rows = tuple((name, ", ".join(sorted(versions))) for name, versions in sorted(found.items()))
    return Section("Environment", [Table(("package", "version"), rows)])


def _vote_sections(record: RunRecord) -> list[Section]:
    numbers = record.numbers
    header = (
        "method", "question", f"{numbers['baseline']} better", "method better", "both good",
        "both bad", "method − baseline", "votes", "agreement",
    )  # fmt: skip
    rows = []
    for method, questions in numbers["methods"].items():
        for question, shares in questions.items():
            names = ("baseline", "method", "both_good", "both_bad", "difference")
            cells = [
                _with_interval("{:.1%}", *shares[name]) if name in shares else "" for name in names
            ]
            alpha = numbers["agreement"][question]
            agreement = "" if alpha is None else f"{alpha:.2f}"
            rows.append((method, question, *cells, str(shares["votes"]), agreement))
    text = (
        f"{numbers['raters_counted']} of {numbers['raters']} raters count. {numbers['rule']} "
        "Intervals are 95 % bootstrap over raters; agreement is Krippendorff's alpha."
    )
    if numbers["notice"]:
        text = f"{numbers['notice']}. {text}"
    lead = Text(judge_votes(numbers), is_lead=True)
    return [Section("Human votes", [lead, Text(text), Table(header, tuple(rows))])]


def _table(
    summary: dict[str, dict[str, Any]],
    columns: dict[str, tuple[str, str]],
    difference: str | None = None,
) -> Table:
    shown = [name for name in columns if any(name in metrics for metrics in summary.values())]
    header = ["algorithm", *(columns[name][0] for name in shown)]
    rows = []
    for algo, metrics in summary.items():
        cells = [algo]
        for name in shown:
            entry = metrics.get(name)
            scale = 1e-6 if name == "memory_bytes" else 1
            values = [entry[part] for part in ("value", "low", "high")] if entry else [None] * 3
            scaled = [None if value is None else value * scale for value in values]
            cells.append(_with_interval(columns[name][1], *scaled))
        if difference:
            entry = metrics.get(difference, {}).get("difference")
            cells.append(_with_interval("{:+.1%}", *entry) if entry and algo != "dense" else "")
        rows.append(tuple(cells))
    if difference:
        header.append("to dense")
    return Table(tuple(header), tuple(rows))


def _with_interval(form: str, value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return ""
    interval = "" if low is None or high is None else f" [{form.format(low)}, {form.format(high)}]"
    return form.format(value) + interval


def _draw(draw: Callable[[Path], None]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        draw(path)
        return path.read_bytes()
