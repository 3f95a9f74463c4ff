"""The table of rules that choose blocks, with every tail, at equal densities."""

from collections import defaultdict
from statistics import fmean
from typing import Any

from benchmarks.pages.builtin import the_model
from benchmarks.pages.paired import interval, read_at
from nabla_attn.bench.report import table
from nabla_attn.record import RunRecord

TAILS = {None: "dropped", "mean": "mean", "first": "first"}
Points = dict[tuple[str, str | None], list[dict[str, Any]]]


def rule_table(record: RunRecord) -> list[str]:
    """Return a row for each rule with errors at equal densities, and which is best."""
    config, prompts = record.config, record.numbers["results"]
    found = [_points(prompt["rows"]) for prompt in prompts]
    densities = sorted({row["density"] for row in found[0]["exact mass", None]})
    names = list(dict.fromkeys(name for name, _ in found[0]))
    columns = [(density, tail) for density in densities for tail in TAILS]
    errors = {
        name: [_at(found, name, tail, density, "error") for density, tail in columns]
        for name in names
    }
    recalls = {
        name: [_at(found, name, None, density, "recall") for density in densities] for name in names
    }
    frames, height, width = config["tokens"]
    heads = [f"{density:.3f}: {TAILS[tail]}" for density, tail in columns]
    heads += [f"recall at {density:.3f}" for density in densities]
    return [
        f"{the_model(config)}, {frames}x{height}x{width} tokens, {config['steps']} steps, guidance "
        f"{config['guidance']:g}, {len(prompts)} dense videos; every call, layer, head and both "
        "guidance branches. Relative error of attention's output to dense attention, on "
        f"{config['num_tokens']} queries of each of {config['num_blocks']} drawn blocks of a call, "
        "at three densities of kept pairs, where dropped blocks are left out and with each tail. "
        "Rules that do not choose a number of blocks are read between their settings, linearly in "
        "the logarithm of the density. *Recall*: exact attention's probability inside the kept "
        "blocks. The last two rows choose by what no estimate knows: exact mass, and how far "
        "leaving a block to the tail moves the output, one block at a time. Intervals are over "
        "prompts, and not wider for choosing the best of many rules.",
        "",
        *table(["rule", *heads], [_row(n, errors[n], recalls[n]) for n in names]),
        *(_best(errors, *each) for each in zip(heads, range(len(columns)), strict=False)),
    ]


def _points(rows: list[dict[str, Any]]) -> Points:
    """Return the settings of every rule and tail, by rising density."""
    found: Points = defaultdict(list)
    for row in rows:
        found[_name(row["rule"]), row["tail"]].append(row)
    for points in found.values():
        points.sort(key=lambda row: row["density"])
    return found


def _name(rule: str) -> str:
    """Return the rule without its numbers."""
    if rule.startswith("exact"):
        return rule.rpartition(" ")[0]
    return "_".join(part.partition("-")[0] for part in rule.split("_"))


def _at(
    found: list[Points], name: str, tail: str | None, density: float, number: str
) -> list[float] | None:
    """Return what each prompt has at a density; None where its settings do not reach there."""
    # A setting may miss a density by rounding.
    lines = ([(row["density"], row[number]) for row in points[name, tail]] for points in found)
    values = [read_at(line, density, slack=0.05) for line in lines]
    return None if None in values else [value for value in values if value is not None]


def _row(
    name: str, errors: list[list[float] | None], recalls: list[list[float] | None]
) -> list[str]:
    label = name if name.startswith("exact") else f"`{name}`"
    return [label, *("-" if x is None else f"{fmean(x):.3f}" for x in (*errors, *recalls))]


def _best(errors: dict[str, list[list[float] | None]], head: str, column: int) -> str:
    """Return the best rule of a column, against top share, as a line of a list."""
    values = {
        name: columns[column] for name, columns in errors.items() if not name.startswith("exact")
    }
    known = {name: value for name, value in values.items() if value is not None}
    best = min(known, key=lambda name: fmean(known[name]))
    if best == "topk":
        return f"- {head}: `topk` errs least."
    less = [b - a for a, b in zip(known[best], known["topk"], strict=True)]
    text = f"- {head}: `{best}` errs least, {fmean(less):.4f} less than `topk`"
    ends = interval(less)
    return f"{text}." if ends is None else f"{text} (95 % interval {ends[0]:.4f} to {ends[1]:.4f})."
