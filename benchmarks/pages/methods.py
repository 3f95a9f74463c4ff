"""The parts of docs/methods.md that are generated: the list of methods, and what was measured."""

from pathlib import Path

from benchmarks.pages import board_figure
from benchmarks.pages.board import build_board
from benchmarks.pages.judged import build_judged
from benchmarks.pages.matrix import build_matrix
from nabla_attn.bench.report import table
from nabla_attn.evaluation.leaderboard import read_records, rows_of
from nabla_attn.files import write_text
from nabla_attn.methods import NAMES, find
from nabla_attn.methods.contract import Method
from nabla_attn.record import RunRecord

EXACT = {"code": "the code", "paper": "the paper", "reconstructed": "reconstructed"}


def write_parts(page: Path, records: Path) -> None:
    """Write the list anew between its marks, and every other part that has records."""
    parts = {"list": build_list()}
    images = page.parent / "images"
    for name, folder in (("board", "methods"), ("synthetic", "methods_synthetic")):
        if found := read_records(records / folder):
            lines = build_board(found) + _draw(images, folder, found)
            parts[name] = "\n\n".join([*_locality(records / folder), *lines])
    for name in ("matrix", "matrix_synthetic"):
        if found := read_records(records / name):
            parts[name] = "\n\n".join(build_matrix(found))
    if (records / "judged.json").is_file():
        judged = RunRecord.load(records / "judged.json")
        parts["judged"] = "\n\n".join(build_judged(judged, read_records(records / "methods")))
    text = page.read_text(encoding="utf-8")
    for name, part in parts.items():
        text = _between(text, name, part)
    write_text(page, text)


def _between(text: str, name: str, part: str) -> str:
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, mark, rest = text.partition(begin)
    if not mark:
        raise ValueError(f"the page has no {begin!r}. Put it and {end!r} where the part belongs.")
    return f"{before}{begin}\n{part.strip()}\n{end}{rest.partition(end)[2]}"


def _draw(images: Path, name: str, records: list[RunRecord]) -> list[str]:
    """Draw the figure for light and dark pages, and return what shows it."""
    title, lines = "Error of the output against milliseconds, a line for each method", []
    for shade in ("light", "dark"):
        file = f"{name}-{shade}.svg"
        board_figure.draw(images / file, rows_of(records), is_dark=shade == "dark")
        lines.append(f"![{title}](images/{file}#only-{shade})")
    return lines


def _locality(folder: Path) -> list[str]:
    """Return how local the synthetic set is, where that was recorded."""
    path = folder / "locality.json"
    if not path.is_file():
        return []
    record = RunRecord.load(path)
    near = "x".join(str(2 * side + 1) for side in record.config["near"])
    head = [
        "step",
        "head",
        "entropy, bits",
        "of even attention",
        f"mass in {near} tokens",
        "mass at the same place",
        *(f"mass in top {n} %" for n in (1, 5, 10, 20)),
    ]
    names = ("entropy", "uniform", "near", "same_place", "top_1", "top_5", "top_10", "top_20")
    rows = [
        [step, kind, *(f"{numbers[name]:.2f}" for name in names)]
        for step, kinds in record.numbers["steps"].items()
        for kind, numbers in kinds.items()
    ]
    return ["\n".join(table(head, rows))]


def build_list() -> str:
    """Return the table of methods and, below it, where each is from."""
    methods = [find(name) for name in NAMES]
    table = [
        "| method | what it is | kind | exact to | gradients | needs |",
        "|---|---|---|---|---|---|",
    ]
    table += [_row(method) for method in methods]
    return "\n".join([*table, "", *map(_source, methods)])


def _row(method: Method) -> str:
    cells = [
        f"`{method.form}`",
        method.title,
        method.kind,
        EXACT[method.exactness],
        "yes" if method.is_trainable else "no",
        ", ".join(method.needs),
    ]
    return f"| {' | '.join(cells)} |"


def _source(method: Method) -> str:
    parts = [f"- `{method.name}`: {method.paper}"]
    if method.code:
        parts.append(f"code {method.code} ({method.licence or 'no licence stated'})")
    if method.published:
        parts.append(f"as published `{method.published}`")
    line = "; ".join(parts) + "."
    return f"{line} Ours: {method.ours.rstrip('.')}." if method.ours else line
