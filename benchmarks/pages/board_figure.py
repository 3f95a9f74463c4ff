"""The leaderboard's figure: error against seconds, a line for each method, named where it ends."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.pages.board import Rows, lines_of
from nabla_attn.files import whole_file
from nabla_attn.methods import find

# Okabe and Ito's colours, which colour-blind readers tell apart; black and yellow left out.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P")
GROUPS = {
    "pattern": "Patterns of places: static, calibrated, or chosen among a few",
    "share": "A number of blocks for each row",
    "mass": "As many blocks as a mass or a threshold takes",
}
MOST_PAIRS = 0.9
"""Rows that keep more are not drawn: little was left out."""
LABEL_GAP = 0.052
"""Least distance of two labels, as a share of the panel's height."""


def group_of(method: str) -> str:
    """Return which panel a method is in: by its kind, or by what its first number means."""
    row = find(method.partition("_")[0])
    names = {parameter.name for parameter in row.parameters}
    if row.kind in ("static", "calibrated") or names & {"sink", "vertical"}:
        return "pattern"
    first = row.parameters[0].name if row.parameters else "share"
    return "share" if first in ("share", "blocks") else "mass"


def draw(path: Path, rows: Rows, *, is_dark: bool) -> None:
    """Draw a panel for each group, the other groups' lines in grey behind it.

    Args:
        path: The SVG file. The same rows give the same bytes.
        rows: Rows of a leaderboard; those above `MOST_PAIRS` only give dense attention's seconds.
        is_dark: Whether the page behind it is dark.
    """
    ink, grey = ("#e6e6e6", "#5a5f66") if is_dark else ("#222222", "#c4c9cf")
    drawn = [row for row in rows if row["density"] <= MOST_PAIRS]
    lines = {
        method: [
            (row["seconds"] * 1e3, row["error"])
            for row in sorted(mine, key=lambda row: float(row["density"]))
        ]
        for method, mine in lines_of(drawn).items()
    }
    shown = [name for name in GROUPS if any(group_of(method) == name for method in lines)]
    figure = Figure(figsize=(8, 3.9 * len(shown)), layout="constrained", facecolor="none")
    panels = figure.subplots(len(shown), sharex=True, sharey=True, squeeze=False)[:, 0]
    dense = [row["seconds"] * 1e3 for row in rows if row["algorithm"] == "dense"]
    for axes, group in zip(panels, shown, strict=True):
        mine = {m: line for m, line in lines.items() if group_of(m) == group}
        for method, line in lines.items():
            if method not in mine:
                axes.plot(*zip(*line, strict=True), color=grey, linewidth=0.7, zorder=1)
        _dress(axes, ink)
        axes.set_title(GROUPS[group], loc="left", fontsize=10, color=ink)
        for each in dense:
            axes.axvline(each, color=ink, linewidth=0.8, linestyle=(0, (1, 2)))
            where = axes.get_xaxis_transform()
            axes.text(each, 1, " dense", color=ink, fontsize=8, va="top", transform=where)
        # Labels are placed in the panel's final limits, which all lines set.
        axes.set_ylim(*_limits([error for line in lines.values() for _, error in line]))
        axes.set_xlim(*_limits([ms for line in lines.values() for ms, _ in line] + dense))
        _draw_lines(axes, mine, ink)
    panels[-1].set_xlabel("milliseconds of a call", color=ink)
    path.parent.mkdir(exist_ok=True)
    with (
        whole_file(path) as temporary,
        rc_context({"svg.hashsalt": "methods", "svg.fonttype": "none"}),
    ):
        # Fixed metadata: the same records give the same bytes.
        figure.savefig(temporary, format="svg", metadata={"Date": None})


def _dress(axes: Any, ink: str) -> None:
    axes.set(xscale="log", yscale="log", facecolor="none")
    axes.set_ylabel("error of the output", color=ink)
    axes.tick_params(colors=ink, which="both", labelsize=8)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25, linewidth=0.5)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(ink)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    return min(values) / 1.1, max(values) * 1.1


def _draw_lines(axes: Any, lines: dict[str, list[tuple[float, float]]], ink: str) -> None:
    """Draw the lines, and a name for each at the right of the panel, led to its end."""
    # Rising, as `spread` wants places.
    order = sorted(lines, key=lambda method: lines[method][-1][1])
    to_panel = axes.transData + axes.transAxes.inverted()
    ends = [float(to_panel.transform(lines[method][-1])[1]) for method in order]
    heights = spread(ends, LABEL_GAP)
    for index, (method, height) in enumerate(zip(order, heights, strict=True)):
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(
            *zip(*lines[method], strict=True),
            color=colour,
            linestyle=DASHES[index // len(COLOURS) % len(DASHES)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=4,
            linewidth=1.4,
            zorder=3,
        )
        axes.annotate(
            method,
            xy=lines[method][-1],
            xytext=(1.03, height),
            textcoords="axes fraction",
            fontsize=8,
            color=ink,
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkB": 3},
        )


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Move rising places apart so that neighbours keep a gap, each as little as may be.

    Places that touch move together: a run of them is centred on its mean.
    """
    runs: list[list[float]] = []
    for place in places:
        runs.append([place])
        while len(runs) > 1 and _start(runs[-1], gap) < _start(runs[-2], gap) + gap * len(runs[-2]):
            last = runs.pop()
            runs[-1] += last
    return [_start(run, gap) + gap * index for run in runs for index in range(len(run))]


def _start(run: list[float], gap: float) -> float:
    return sum(run) / len(run) - gap * (len(run) - 1) / 2
