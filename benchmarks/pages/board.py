"""The leaderboard's tables: methods at equal densities, at equal seconds, and who leads where."""

from statistics import fmean
from typing import Any

from benchmarks.pages.paired import as_good_as, read_at
from nabla_attn.bench.report import table
from nabla_attn.config import parse
from nabla_attn.evaluation.leaderboard import DENSITIES, left_out, rows_of
from nabla_attn.record import RunRecord

# Ratio of densities from which on they do not compare.
FAR = 1.4
SHARES_OF_DENSE = (0.1, 0.2, 0.3, 0.5, 0.7)
"""Seconds at which methods are compared, over those of dense attention."""
HEAD = ("algorithm", "pairs kept", "exact mass", "error of the output")
TIMES = ("choosing, ms", "whole, ms", "share of ideal")

Rows = list[dict[str, Any]]


def method_of(algorithm: str) -> str:
    """Return the method of an algorithm, with what stands behind its numbers."""
    first, *rest = algorithm.split("_")
    return "_".join([first.partition("-")[0], *rest])


def build_board(records: list[RunRecord]) -> list[str]:
    """Return the paragraphs of a leaderboard: at every density, at every time, and the leaders."""
    rows = rows_of(records)
    sparse = [row for row in rows if row["algorithm"] != "dense"]
    lines = [_of_what(records), *say_left_out(records), *_at_densities(sparse)]
    dense = next((row for row in rows if row["algorithm"] == "dense"), None)
    if dense is not None:
        lines += _at_seconds(sparse, dense["seconds"])
    return lines


def say_left_out(records: list[RunRecord]) -> list[str]:
    """Return a paragraph that names the algorithms which not all records have, if there are any."""
    missing = ", ".join(f"`{algorithm}`" for algorithm in left_out(records))
    return [f"Not below, because some prompts lack them: {missing}."] if missing else []


def _of_what(records: list[RunRecord]) -> str:
    config, count = records[0].config, len(records)
    if config.get("data") == "synthetic":
        size = "x".join(map(str, config["tokens"]))
        samples = "1 sample" if count == 1 else f"{count} samples"
        what = f"{samples} of {size} tokens and {config['steps']} steps, heads "
        what += f"{', '.join(config['heads'])} of {config['dim']} dimensions."
    else:
        what = (
            f"{count} prompts of {config['frames']} frames and {config['steps']} steps; in each, "
            "two layers and guidance branches through all steps."
        )
    reference = records[0].numbers.get("reference")
    if reference:
        what += (
            f" Milliseconds are the median ratio to `{reference}`, which was timed in the same "
            "turns, times its own median."
        )
    return f"{what} Device: {records[0].device}."


def _at_densities(rows: Rows) -> list[str]:
    lines, leaders = [], []
    for density in DENSITIES:
        near = sorted((r for r in rows if nearest(r["density"]) == density), key=_error)
        if not near:
            continue
        lines += [f"### About {density:.0%} of the token pairs", _table(near)]
        leader = near[0]
        equal = as_good_as(leader["algorithm"], {row["algorithm"]: row["errors"] for row in near})
        leaders.append(
            [
                f"{density:.0%}",
                f"`{leader['algorithm']}`",
                f"{leader['error']:.3f}",
                _names(equal, leader["errors"]),
                f"`{max(near, key=_recall)['algorithm']}`",
            ]
        )
    others = [row for row in rows if nearest(row["density"]) is None]
    if others:
        lines += ["### At densities of their own", _table(sorted(others, key=_error))]
    if leaders:
        head = ["about", "least error", "error", "not told apart", "most mass"]
        lines += [
            "### Who leads at a density",
            "\n".join(table(head, leaders)),
            "*Not told apart*: the paired difference of errors to the least has a 95 % interval "
            "over prompts that reaches 0; intervals are not wider for choosing the best of many.",
        ]
    return lines


def nearest(density: float) -> float | None:
    """Return the density of `DENSITIES` that is nearest in ratio; None where none is near."""

    def ratio(each: float) -> float:
        return max(each / density, density / each)

    found = min(DENSITIES, key=ratio)
    return found if ratio(found) < FAR else None


def _error(row: dict[str, Any]) -> float:
    return float(row["error"])


def _recall(row: dict[str, Any]) -> float:
    return float(row["recall"])


def _names(algorithms: list[str], errors: list[float]) -> str:
    """Return the algorithms that are not told apart from one with these errors, in words."""
    if len(errors) < 2:
        return "a single one has no interval"
    return ", ".join(f"`{name}`" for name in algorithms) or "none"


def _table(rows: Rows) -> str:
    kinds = list(rows[0].get("error_of_heads", ()))
    times = TIMES if rows[0].get("ideal") is not None else TIMES[:2]
    head = [*HEAD, *(f"error, {kind}" for kind in kinds), *times]
    return "\n".join(table(head, [_row(row, kinds) for row in rows]))


def _row(row: dict[str, Any], kinds: list[str]) -> list[str]:
    spread = row["error_spread"]
    cells = [
        f"`{row['algorithm']}`",
        f"{row['density']:.1%}",
        f"{row['recall']:.3f}",
        f"{row['error']:.3f}" + ("" if spread is None else f" ± {spread:.3f}"),
        *(f"{row['error_of_heads'][kind]:.3f}" for kind in kinds),
        f"{row['select_seconds'] * 1e3:.0f}",
        f"{row['seconds'] * 1e3:.0f}",
    ]
    return cells if row["ideal"] is None else [*cells, f"{row['ideal']:.2f}"]


def errors_in_time(rows: Rows, seconds: float) -> dict[str, list[float]]:
    """Return each method's errors, a prompt each, that it reaches in some seconds.

    They are read between its densities, linearly in the logarithm of seconds, once points are left
    out that are slower than another of the method and err more. Methods of which every point is
    slower, or none is, are left out: nothing is read beyond what was measured.
    """
    found = {}
    for method, mine in lines_of(rows).items():
        useful: Rows = []
        for row in sorted(mine, key=lambda row: float(row["seconds"])):
            if not useful or row["error"] < useful[-1]["error"]:
                useful.append(row)
        read = [
            read_at([(row["seconds"], row["errors"][i]) for row in useful], seconds)
            for i in range(len(mine[0]["errors"]))
        ]
        if None not in read:
            found[method] = [value for value in read if value is not None]
    return found


def lines_of(rows: Rows) -> dict[str, Rows]:
    """Return the rows of each method."""
    lines: dict[str, Rows] = {}
    for row in rows:
        if not parse(row["algorithm"]).is_dense:
            lines.setdefault(method_of(row["algorithm"]), []).append(row)
    return lines


def _at_seconds(rows: Rows, dense: float) -> list[str]:
    times = {share: errors_in_time(rows, share * dense) for share in SHARES_OF_DENSE}
    times = {share: found for share, found in times.items() if found}
    if not times:
        return []
    methods = sorted(
        sorted({method for found in times.values() for method in found}),
        key=lambda method: min(
            fmean(found[method]) / min(map(fmean, found.values()))
            for found in times.values()
            if method in found
        ),
    )
    body = [
        [f"`{m}`", *(f"{fmean(f[m]):.3f}" if m in f else "-" for f in times.values())]
        for m in methods
    ]
    head = ["method", *(f"{share:.0%} of dense, {share * dense * 1e3:.0f} ms" for share in times)]
    leaders = []
    for share, found in times.items():
        best = min(found, key=lambda method: fmean(found[method]))
        equal = _names(as_good_as(best, found), found[best])
        leaders.append([f"{share:.0%} of dense", f"`{best}`", f"{fmean(found[best]):.3f}", equal])
    return [
        "### At equal seconds",
        f"Error that a method reaches in a share of dense attention's {dense * 1e3:.0f} ms a call, "
        "choosing included, read between its densities and nowhere beyond them.",
        "\n".join(table(head, body)),
        "\n".join(table(["in", "least error", "error", "not told apart"], leaders)),
    ]
