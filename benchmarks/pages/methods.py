"""The parts of docs/methods.md that are generated: the list of methods, and the leaderboard."""

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from nabla_attn.evaluation.leaderboard import DENSITIES, rows_of
from nabla_attn.files import whole_file, write_text
from nabla_attn.methods import NAMES, find
from nabla_attn.methods.contract import Method
from nabla_attn.record import RunRecord

# Okabe and Ito's colours, which colour-blind readers tell apart; black and yellow left out.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
# Ratio of densities from which on they do not compare.
FAR = 1.4
LINES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
EXACT = {"code": "the code", "paper": "the paper", "reconstructed": "reconstructed"}


def write_parts(page: Path, records: Path) -> None:
    """Write the list anew between its marks, and the leaderboard where it has records."""
    text = _between(page.read_text(encoding="utf-8"), "list", build_list())
    found = read_records(records / "methods")
    if found:
        rows = rows_of(found)
        for is_dark in (False, True):
            _draw(page.parent / "images" / _picture(is_dark), rows, is_dark=is_dark)
        text = _between(text, "board", build_board(found))
    write_text(page, text)


def _between(text: str, name: str, part: str) -> str:
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{part}\n{end}{rest.partition(end)[2]}"


def read_records(folder: Path) -> list[RunRecord]:
    """Read the records of prompts that the leaderboard left in a folder."""
    return [RunRecord.load(path) for path in sorted(folder.glob("p????.json"))]


def build_board(records: list[RunRecord]) -> str:
    """Return the leaderboard: for every density the methods near it, the least error first."""
    rows = rows_of(records)
    frames, steps = records[0].config["frames"], records[0].config["steps"]
    parts = [
        f"{len(records)} prompts of {frames} frames and {steps} steps; in each, two layers and "
        f"guidance branches through all steps. Device: {records[0].device}."
    ]
    for density in DENSITIES:
        near = [row for row in rows if _nearest(row["density"]) == density]
        near.sort(key=lambda row: row["error"])
        if not near:
            continue
        parts += [
            f"### About {density:.0%} of the token pairs",
            _board_table(near),
            f"Least error: `{near[0]['algorithm']}`. Most mass: "
            f"`{max(near, key=lambda row: row['recall'])['algorithm']}`.",
        ]
    others = [row for row in rows if _nearest(row["density"]) is None]
    if others:
        parts += ["### At densities of their own", _board_table(others)]
    parts += [
        "![Error of the output against milliseconds, a line for each method]"
        f"(images/{_picture(False)}#only-light)",
        "![Error of the output against milliseconds, a line for each method]"
        f"(images/{_picture(True)}#only-dark)",
    ]
    return "\n\n".join(parts)


def _nearest(density: float) -> float | None:
    """Return the density of `DENSITIES` that is nearest in ratio; None where none is near."""

    def ratio(each: float) -> float:
        return max(each / density, density / each)

    nearest = min(DENSITIES, key=ratio)
    return nearest if ratio(nearest) < FAR else None


def _board_table(rows: list[dict[str, Any]]) -> str:
    head = ("algorithm", "pairs kept", "exact mass", "error of the output", "choosing, ms")
    lines = [f"| {' | '.join([*head, 'whole, ms'])} |", "|---|---|---|---|---|---|"]
    return "\n".join([*lines, *map(_board_row, rows)])


def _board_row(row: dict[str, Any]) -> str:
    spread = row["error_spread"]
    error = f"{row['error']:.3f}" + ("" if spread is None else f" ± {spread:.3f}")
    cells = [
        f"`{row['algorithm']}`",
        f"{row['density']:.1%}",
        f"{row['recall']:.3f}",
        error,
        f"{row['select_seconds'] * 1e3:.0f}",
        f"{row['seconds'] * 1e3:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def _picture(is_dark: bool) -> str:
    return f"methods-{'dark' if is_dark else 'light'}.svg"


def _draw(path: Path, rows: list[dict[str, Any]], *, is_dark: bool) -> None:
    """Draw error against milliseconds, a line for each method."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        name = row["algorithm"].partition("-")[0]
        lines.setdefault(name, []).append((row["seconds"] * 1e3, row["error"]))
    ink = "#e6e6e6" if is_dark else "#222222"
    figure = Figure(figsize=(8, 5.2), layout="constrained", facecolor="none")
    axes = figure.subplots()
    axes.set_facecolor("none")
    for index, name in enumerate(sorted(lines, key=lambda name: min(y for _, y in lines[name]))):
        axes.plot(
            *zip(*sorted(lines[name]), strict=True),
            color=COLOURS[index % len(COLOURS)],
            linestyle=LINES[index // len(COLOURS) % len(LINES)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=4,
            label=name,
        )
    axes.set(xlabel="milliseconds of a call", ylabel="error of the output", xscale="log")
    axes.set_yscale("log")
    axes.tick_params(colors=ink, which="both")
    axes.xaxis.label.set_color(ink)
    axes.yaxis.label.set_color(ink)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(ink)
    axes.grid(alpha=0.2)
    axes.legend(
        frameon=False, fontsize=8, labelcolor=ink, loc="center left", bbox_to_anchor=(1, 0.5)
    )
    path.parent.mkdir(exist_ok=True)
    with whole_file(path) as temporary, rc_context({"svg.hashsalt": "methods"}):
        # Fixed metadata: the same records give the same bytes.
        figure.savefig(temporary, format="svg", metadata={"Date": None})


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
