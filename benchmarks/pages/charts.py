"""Two charts of the benchmark records: speed against density, and time against tokens."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from nabla_attn.bench.report import attention_results
from nabla_attn.files import whole_file
from nabla_attn.record import RunRecord


def draw_charts(records: list[RunRecord], folder: Path) -> list[tuple[str, str]]:
    """Draw the charts that the records allow; returns the title and the file name of each."""
    drawn = []
    attention = [result for record in records for result in attention_results(record)]
    forward = [r for r in attention if r["direction"] == "forward"]
    if forward:
        _draw(folder / "speed_by_density.png", lambda axes: _speed_by_density(axes, forward))
        drawn.append(("Speed-up over dense by density", "speed_by_density.png"))
    scaling = [r.numbers["results"][0] for r in records if r.kind == "bench-scaling"]
    if scaling:
        _draw(folder / "time_by_tokens.png", lambda axes: _time_by_tokens(axes, scaling[0]))
        drawn.append(("Seconds by number of tokens", "time_by_tokens.png"))
    return drawn


def _draw(path: Path, plot: Any) -> None:
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    plot(axes)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    with whole_file(path) as temporary:
        # Fixed metadata: the same records give the same bytes.
        figure.savefig(temporary, format="png", metadata={"Software": None})


def _speed_by_density(axes: Any, results: list[dict[str, Any]]) -> None:
    curves: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        for name, numbers in result["contenders"].items():
            if "speed_up" in numbers and not numbers["is_dense"]:
                label = f"{result['workload']}, {result['dtype']}, {name}"
                curves.setdefault(label, []).append((result["density"], numbers["speed_up"]))
    for label, points in curves.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    ideal = sorted({result["density"] for result in results})
    axes.plot(ideal, [1 / d for d in ideal], "k--", linewidth=1, label="ideal: 1 / density")
    axes.set(xlabel="density (kept share of token pairs)", ylabel="times faster than dense")
    axes.set_yscale("log")
    axes.set_title("Speed-up over dense attention, map and reorder included", loc="left")


def _time_by_tokens(axes: Any, result: dict[str, Any]) -> None:
    for name in ("dense", "sparse", "map"):
        points = [
            (p["tokens"], p["seconds"][name]) for p in result["points"] if name in p["seconds"]
        ]
        slope = result["exponents"][name]
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{name}, exponent {slope:.2f}")
    axes.set(xlabel="tokens", ylabel="seconds", xscale="log", yscale="log")
    axes.set_title("Seconds by number of tokens, density 0.2", loc="left")
