"""docs/samples.md: the videos that the demo's prompt was chosen from, none left out."""

from pathlib import Path
from statistics import fmean
from typing import Any

from nabla_attn.moving_shapes.judge import JUDGE
from nabla_attn.record import RunRecord
from nabla_attn.viz.document import Picture, Section, Table, Text, write_markdown

TITLE = "Samples of the built-in model"
INTRODUCTION = (
    "All {count} prompts of which the demo shows the median by SSIM, “{chosen}”, in their order, "
    "none left out: above dense attention, below {algorithm}, from the same noise. Their "
    "combinations of colour, shape and direction are such as training shows; the noise is "
    "new. Outline is the overlap with the best-fitting ideal shape, by the judge that the page "
    "about quality explains; it sees the right shape from 0.92 on."
)


def write_page(path: Path, records: Path) -> None:
    """Write the page, if the prompts, their judgement and their pictures are there.

    Args:
        path: The Markdown file; its pictures lie in a folder beside it.
        records: The folder of the records.
    """
    choice = records / "demo_choice.json"
    pictures = sorted((path.parent / f"{path.stem}-images").glob("*.png"))
    if not choice.is_file() or not pictures:
        return
    demo = RunRecord.load(choice)
    prompts, algorithm = demo.numbers["prompts"], demo.config["sparse_algo"]
    judged = {
        name: _verdicts(records / f"judge-{JUDGE}_trained_{name}.json", len(prompts))
        for name in ("dense", algorithm)
    }
    text = INTRODUCTION.format(
        count=len(prompts), chosen=demo.numbers["chosen"]["prompt"], algorithm=algorithm
    )
    sections = [Section("All together", [Text(text), _means(prompts, judged)])]
    for index, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        shown = Picture(picture.stem, prompt["prompt"], picture.read_bytes())
        note = Text(_note(prompt, {name: found[index] for name, found in judged.items()}))
        sections.append(Section(f"{index + 1}. {prompt['prompt']}", [shown, note]))
    write_markdown(TITLE, sections, path)


def _verdicts(path: Path, count: int) -> list[dict[str, Any]]:
    """What the judge says of the first prompts."""
    found = RunRecord.load(path).numbers["prompts"][:count]
    if len(found) < count:
        raise ValueError(f"{path} judges {len(found)} of {count} prompts. Run judge_builtin again.")
    return [prompt["right"] for prompt in found]


def _means(prompts: list[dict[str, Any]], judged: dict[str, list[dict[str, Any]]]) -> Table:
    header = ("attention", "SSIM to dense", "outline", "worst frame", "shape right")
    rows = []
    for name, rights in judged.items():
        ssim = "" if name == "dense" else f"{fmean(prompt['ssim'] for prompt in prompts):.3f}"
        means = [fmean(right[key] for right in rights) for key in ("outline", "outline_min")]
        right = fmean(float(right["shape"]) for right in rights)
        rows.append((name, ssim, *(f"{mean:.3f}" for mean in means), f"{right:.0%}"))
    return Table(header, tuple(rows))


def _note(prompt: dict[str, Any], rights: dict[str, dict[str, Any]]) -> str:
    outlines = ", ".join(f"{right['outline']:.2f} {name}" for name, right in rights.items())
    return f"Seed {prompt['seed']}. SSIM {prompt['ssim']:.3f}; outline {outlines}."
