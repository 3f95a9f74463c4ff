"""Curves of a summary: quality against density and against seconds; where recall is lost."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nabla_attn.config import parse
from nabla_attn.core.grid import BlockShape
from nabla_attn.evaluation.records import Records, measured_items, read_records, summary_record
from nabla_attn.files import whole_file
from nabla_attn.record import RunRecord

INK, MUTED, RULE = "#1b1f24", "#667080", "#d8dee6"
STYLES = {
    "nabla": ("#0f766e", "o"),
    "nabla + window": ("#1d4ed8", "s"),
    "window": ("#b45309", "^"),
    "top-k": ("#7e22ce", "D"),
    "top-k + window": ("#be123c", "v"),
    "dense": (INK, "*"),
}
QUALITIES = {
    "psnr": "PSNR to dense, dB",
    "ssim": "SSIM to dense",
    "judge_all": "prompts wholly right",
    "true_mass": "true attention mass kept",
    "lpips": "LPIPS to dense (less is better)",
    "clip": "CLIP score",
}
COSTS = {"density": "token pairs kept", "seconds": "seconds in the transformer"}


def kind_of(algo: str) -> str:
    """Return the kind of an algorithm, which decides its colour and marker."""
    config = parse(algo)
    if config.is_dense:
        return "dense"
    name = "nabla" if config.threshold is not None else "top-k" if config.topk else ""
    if config.window is None:
        return name
    return f"{name} + window" if name else "window"


def line_of(algo: str) -> tuple[str, str]:
    """Return kind and name of the line that an algorithm is on: one for each block shape."""
    kind, sides = kind_of(algo), parse(algo).block
    if sides is None:
        return kind, kind
    return kind, f"{kind}, {BlockShape(*sides)} blocks"


def write_summary(run: Path) -> RunRecord:
    """Write summary.json, curves.png and losses.png of a run into its folder.

    Raises:
        ValueError: The folder has no records that compare.
    """
    records = read_records(run)
    record = summary_record(records)
    record.save(run / "summary.json")
    algorithms = record.numbers["algorithms"]
    if len(algorithms) > 1:
        draw_curves(algorithms, run / "curves.png")
    if mean_maps(records, "true_mass"):
        draw_true_mass(records, run / "losses.png")
    return record


def draw_curves(summary: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
    """Write a PNG with a row for each quality that was measured, against density and seconds.

    Args:
        summary: Result of `summarise`.
        path: PNG file, which appears whole or not at all. The same summary gives the same bytes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [
        name
        for name in QUALITIES
        if any(name in metrics for algo, metrics in summary.items() if algo != "dense")
    ]
    figure = Figure(figsize=(10, 2.9 * len(measured) + 0.5), dpi=130, layout="constrained")
    grid = figure.subplots(len(measured), 2, squeeze=False, sharey="row")
    for row, quality in zip(grid, measured, strict=True):
        for axes, cost in zip(row, COSTS, strict=True):
            _draw_panel(axes, summary, quality, cost)
        row[0].set_ylabel(QUALITIES[quality], color=MUTED)
    for axes, label in zip(grid[-1], COSTS.values(), strict=True):
        axes.set_xlabel(label, color=MUTED)
    handles, labels = _legend(grid)
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    with whole_file(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary), metadata={"Software": None})


def draw_true_mass(records: Records, path: str | Path) -> None:
    """Write a PNG of the true attention mass kept by step and layer, a map for each algorithm.

    Raises:
        ValueError: No attention was measured in this run.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    maps = mean_maps(records, "true_mass")
    if not maps:
        raise ValueError("no attention was measured in this run. Pass --num-probed 2.")
    columns = min(3, len(maps))
    rows = -(-len(maps) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.3 * rows + 0.4), dpi=130, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    image: Any = None
    for axes, (algo, values) in zip(grid.flat, maps.items(), strict=False):
        # Layers down, steps across.
        image = axes.imshow(
            list(zip(*values, strict=True)), cmap="YlGnBu", vmin=0, vmax=1, aspect="auto"
        )
        axes.set_title(algo, fontsize=9, loc="left")
        axes.set_xlabel("step", fontsize=7, color=MUTED)
        axes.set_ylabel("layer", fontsize=7, color=MUTED)
        axes.tick_params(labelsize=7, colors=MUTED)
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_major_locator().set_params(integer=True)
    for axes in list(grid.flat)[len(maps) :]:
        axes.axis("off")
    bar = figure.colorbar(image, ax=grid.ravel().tolist(), shrink=0.8)
    bar.set_label("true attention mass kept", color=MUTED, fontsize=8)
    with whole_file(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary), metadata={"Software": None})


def mean_maps(records: Records, measure: str) -> dict[str, list[list[float]]]:
    """Return the means, [steps][layers], over the items that all probed algorithms have."""
    result = {}
    probed = measured_items(records, lambda record: record.numbers.get("probe"))
    for algo, items in sorted(records.items()):
        found = [
            items[name].numbers["probe"][f"{measure}_per_step_and_layer"]
            for name in probed
            if "probe" in items[name].numbers
        ]
        if found:
            result[algo] = [
                [round(sum(cell) / len(cell), 5) for cell in zip(*rows, strict=True)]
                for rows in zip(*found, strict=True)
            ]
    return result


def _draw_panel(
    axes: Any, summary: Mapping[str, Mapping[str, Any]], quality: str, cost: str
) -> None:
    groups: dict[tuple[str, str], list[tuple[float, Any, str]]] = {}
    along = "probe_density" if (quality, cost) == ("true_mass", "density") else cost
    for algo, metrics in summary.items():
        if quality not in metrics or along not in metrics or metrics[quality]["value"] is None:
            continue
        groups.setdefault(line_of(algo), []).append(
            (metrics[along]["value"], metrics[quality], algo)
        )
    for (kind, name), points in groups.items():
        colour, marker = STYLES[kind]
        points.sort(key=lambda point: point[0])
        xs, means = [x for x, _, _ in points], [entry["value"] for _, entry, _ in points]
        low = [
            m - (e["low"] if e["low"] is not None else m)
            for m, (_, e, _) in zip(means, points, strict=True)
        ]
        high = [
            (e["high"] if e["high"] is not None else m) - m
            for m, (_, e, _) in zip(means, points, strict=True)
        ]
        axes.errorbar(
            xs, means, yerr=[[max(0, v) for v in low], [max(0, v) for v in high]],
            color=colour, marker=marker, markersize=9 if kind == "dense" else 5,
            linewidth=0 if "window" in kind else 1.4,  # their points differ in more than one number
            linestyle="-" if name == kind else "--",
            markerfacecolor=colour if name == kind else "white",
            elinewidth=0.8, capsize=2, label=name,
        )  # fmt: skip
    axes.grid(color=RULE, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=MUTED, labelsize=8)
    if cost == "density":
        axes.set_xlim(0, 1.03)


def _legend(grid: Any) -> tuple[list[Any], list[str]]:
    found: dict[str, Any] = {}
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)
