"""The matrix of rule, order and tail: each pair's errors, and what each part is worth."""

from math import sqrt
from statistics import fmean

from benchmarks.pages.board import Rows, nearest, say_left_out
from benchmarks.pages.paired import interval, read_at
from nabla_attn.bench.report import table
from nabla_attn.config import parse
from nabla_attn.evaluation.leaderboard import rows_of
from nabla_attn.record import RunRecord

PARTS = ("rule", "order", "tail")
BASE = {"rule": "topk", "order": "tiles", "tail": "none"}
"""What each part is held against."""

Parts = tuple[str, str, str]
"""Rule, order and tail."""


def parts_of(algorithm: str) -> dict[str, str]:
    """Return the rule, order and tail of an algorithm."""
    config = parse(algorithm)
    order = "tiles" if config.order is None else str(config.order)
    return {"rule": config.uses[0].name, "order": order, "tail": config.tail or "none"}


def build_matrix(records: list[RunRecord]) -> list[str]:
    """Return the paragraphs of the matrix: the errors about each density, and what parts are worth.

    Args:
        records: Those of the prompts.
    """
    rows = [row for row in rows_of(records) if row["algorithm"] != "dense"]
    densities = sorted({d for row in rows if (d := nearest(row["density"])) is not None})
    lines = [
        f"{len(records)} prompts or samples. *Tiles* are boxes of the grid; the other orders cut "
        "blocks from a line of tokens. The summaries of a tail count among the pairs.",
        *say_left_out(records),
    ]
    for density in densities:
        mine = [row for row in rows if nearest(row["density"]) == density]
        lines += [f"### About {density:.0%} of the token pairs", _grid(mine)]
    shared = shared_density(rows)
    if shared is None:
        return [*lines, "No density is between those of all of them, so that parts do not compare."]
    head = ["part", "in place of", "error", "95 % interval", "pairs"]
    lines += [
        f"### What each part is worth at {shared:.1%} of the token pairs",
        "\n".join(table(head, worth_of_parts(rows, shared))),
        "*Error* is the mean change over all pairs of algorithms that differ in this part alone: "
        "less than 0 % is better than what stands in its place. Each error is read at this density "
        "between those at which it was measured, linearly in the logarithm of the density. "
        "Intervals are over prompts.",
    ]
    return lines


def _grid(rows: Rows) -> str:
    found = {tuple(parts_of(row["algorithm"]).values()): row for row in rows}
    rules, orders, tails = (list(dict.fromkeys(key[i] for key in found)) for i in range(3))
    columns = [(order, tail) for order in orders for tail in tails]
    head = ["rule", *(f"{order}, {tail}" for order, tail in columns)]
    body = []
    for rule in rules:
        cells = [found.get((rule, *column)) for column in columns]
        texts = ["-" if row is None else f"{row['error']:.3f}" for row in cells]
        body.append([f"`{rule}`", *texts])
    return "\n".join(table(head, body))


def _errors_of(rows: Rows) -> dict[Parts, list[tuple[float, list[float]]]]:
    """Return the points of each combination of parts: density, and errors of the prompts.

    One that was measured at one density alone is left out: nothing can be read between.
    """
    lines: dict[Parts, list[tuple[float, list[float]]]] = {}
    for row in sorted(rows, key=lambda row: float(row["density"])):
        rule, order, tail = parts_of(row["algorithm"]).values()
        lines.setdefault((rule, order, tail), []).append((float(row["density"]), row["errors"]))
    return {key: line for key, line in lines.items() if len(line) > 1}


def shared_density(rows: Rows) -> float | None:
    """Return the middle of the densities between the ends of every line; None if there is none."""
    lines = _errors_of(rows).values()
    low = max((line[0][0] for line in lines), default=1.0)
    high = min((line[-1][0] for line in lines), default=0.0)
    return sqrt(low * high) if low <= high else None


def worth_of_parts(rows: Rows, density: float) -> list[list[str]]:
    """Return, for each rule, order and tail, what putting it in does to the error at a density.

    It is held against `BASE`'s, with the other two parts the same: the ratio of the errors, prompt
    by prompt, its mean over all pairs that were measured.
    """
    found = {}
    for key, line in _errors_of(rows).items():
        read = [
            read_at([(kept, errors[i]) for kept, errors in line], density)
            for i in range(len(line[0][1]))
        ]
        found[key] = [value for value in read if value is not None]
    lines = []
    for index, part in enumerate(PARTS):
        for value in dict.fromkeys(key[index] for key in found):
            pairs = [
                (errors, found[base])
                for key, errors in found.items()
                if key[index] == value
                and (base := (*key[:index], BASE[part], *key[index + 1 :])) in found
            ]
            if value == BASE[part] or not pairs:
                continue
            changes = [
                fmean(mine[prompt] / other[prompt] - 1 for mine, other in pairs)
                for prompt in range(len(pairs[0][0]))
            ]
            ends = interval(changes)
            text = "-" if ends is None else f"{ends[0]:+.1%} to {ends[1]:+.1%}"
            what = f"{part} `{value}`"
            lines.append([what, f"`{BASE[part]}`", f"{fmean(changes):+.1%}", text, str(len(pairs))])
    return lines
