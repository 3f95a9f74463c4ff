"""The matrix of rule, order and tail: each pair's errors, and what each part is worth."""

from statistics import fmean
from typing import Any

from benchmarks.pages.board import Rows, nearest
from benchmarks.pages.paired import interval
from nabla_attn.bench.report import table
from nabla_attn.config import parse
from nabla_attn.evaluation.leaderboard import rows_of
from nabla_attn.record import RunRecord

PARTS = ("rule", "order", "tail")
BASE = {"rule": "topk", "order": "tiles", "tail": "none"}
"""What each part is held against."""


def parts_of(algorithm: str) -> dict[str, str]:
    """Return the rule, order and tail of an algorithm."""
    config = parse(algorithm)
    order = "tiles" if config.order is None else str(config.order)
    return {"rule": config.uses[0].name, "order": order, "tail": config.tail or "none"}


def build_matrix(records: list[RunRecord]) -> list[str]:
    """Return the paragraphs of the matrix, for each density it was measured at."""
    rows = [row for row in rows_of(records) if row["algorithm"] != "dense"]
    densities = sorted({d for row in rows if (d := nearest(_kept(row))) is not None})
    lines = [
        f"{len(records)} prompts or samples. *Tiles* are boxes of the grid; the other orders cut "
        "blocks from a line of tokens. Rows compare as far as the pairs that they kept do, and the "
        "summaries of a tail count among them."
    ]
    for density in densities:
        mine = [row for row in rows if nearest(_kept(row)) == density]
        lines += [f"### About {density:.0%} of the token pairs", _grid(mine)]
        lines += [
            "\n".join(
                table(
                    ["part", "in place of", "error", "95 % interval", "pairs"], worth_of_parts(mine)
                )
            )
        ]
    lines += [
        "*Error* is the mean change over all pairs of algorithms that differ in this part alone: "
        "less than 0 % is better than what stands in its place. Intervals are over prompts."
    ]
    return lines


def _kept(row: dict[str, Any]) -> float:
    """The density that was asked for, near enough: the tail's summaries come on top of it."""
    return float(row["density"])


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


def worth_of_parts(rows: Rows) -> list[list[str]]:
    """Return, for each rule, order and tail, what putting it in does to the error.

    It is held against `BASE`'s, with the other two parts the same: the ratio of the errors, prompt
    by prompt, its mean over all pairs that were measured.
    """
    found = {tuple(parts_of(row["algorithm"]).values()): row["errors"] for row in rows}
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
