"""The tables of one benchmark record, as Markdown."""

from collections.abc import Iterable
from typing import Any

import torch

from nabla_attn.bench.contenders import Baselines, list_contenders
from nabla_attn.bench.workloads import WORKLOADS, workload
from nabla_attn.cost.attention import attention_work
from nabla_attn.machine import min_tokens
from nabla_attn.record import RunRecord

TITLES = {
    "bench-scaling": "Time against tokens",
    "bench-crossover": "From which length on sparse wins",
    "bench-model": "A whole transformer forward",
}


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table, and an empty one behind it; none without rows."""
    if not rows:
        return []
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines] + [""]


def section(record: RunRecord, lines: list[str] | None = None, *, suffix: str = "") -> str:
    """What a record says, under its title and the environment it was measured in.

    Args:
        record: A record of `nabla bench`, or of any study if `lines` are given.
        lines: The content of the section; None makes the tables of a record of `nabla bench`.
        suffix: What the title ends with.
    """
    title = record.config.get("workload") or TITLES.get(record.kind, record.kind)
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    head = [f"## {title}{suffix}", "", f"{record.device}; {versions}; {record.created[:10]}.", ""]
    if left_out := record.config.get("left_out"):
        head += [f"Left out because there was no time: {', '.join(left_out)}.", ""]
    return "\n".join([*head, *(_tables(record) if lines is None else lines)]) + "\n"


def contender_table(
    names: Iterable[str], device: torch.device, *, baselines: Baselines | None = None
) -> str:
    """Which contenders run for each workload, forward and backward, and why the others cannot."""
    rows = [
        [name, contender, *(reason or "runs" for reason in reasons)]
        for name in names
        for contender, reasons in list_contenders(
            workload(name), device, baselines=baselines
        ).items()
    ]
    return "\n".join(table(["workload", "contender", "forward", "forward + backward"], rows))


def attention_results(record: RunRecord) -> list[dict[str, Any]]:
    """Those results of a record in which contenders were measured."""
    return [result for result in record.numbers["results"] if "contenders" in result]


def _tables(record: RunRecord) -> list[str]:
    results = record.numbers["results"]
    if record.kind == "bench-scaling":
        return _scaling_table(results[0])
    if record.kind == "bench-crossover":
        return _crossover_table(results)
    if record.kind == "bench-model":
        return _model_table(results)
    attention = attention_results(record)
    return [*_attention_table(attention), *_stage_table(attention), *_map_tables(results)]


def _attention_table(results: list[dict[str, Any]]) -> list[str]:
    head = [
        "dtype",
        "direction",
        "density",
        "contender",
        "seconds",
        "speed-up",
        "share of ideal",
        "MEM",
    ]
    rows, absent = [], {}
    for result in results:
        for name, numbers in result["contenders"].items():
            if "why_not" in numbers:
                absent[f"{name}, {result['direction']}"] = numbers["why_not"]
            elif "seconds" not in numbers:
                error = numbers["gate"]["error"]
                off = "is not finite" if error is None else f"off by {error:.2g}"
                absent[name] = f"output {off}"
            else:
                rows.append(_attention_row(result, name, numbers))
    lines = table([*head, "of matmul", "error / budget"], rows)
    lines += [f"- {name}: not run, {reason}." for name, reason in absent.items()]
    return [*lines, *_bounds(results), *_stock_shares(results), ""]


def _stock_shares(results: list[dict[str, Any]]) -> list[str]:
    """How near sparse contenders come to what stock operations could reach."""
    shares: dict[str, list[str]] = {}
    for result in results:
        what = f"{result['dtype']} {result['direction']}"
        for name, numbers in result["contenders"].items():
            if "share_of_stock" in numbers:
                share = f"{what} {numbers['share_of_stock']:.2f} at {result['density']:.3f}"
                shares.setdefault(name, []).append(share)
    return [
        f"- {name}, of what stock operations could reach (products, softmax and one read of what "
        f"is gathered, each at its rate here): {'; '.join(found)}."
        for name, found in shares.items()
    ]


def _bounds(results: list[dict[str, Any]]) -> list[str]:
    """The share of ideal at the full matrix rate: what dense attention leaves to gain."""
    rates: dict[str, list[float]] = {}
    for result in results:
        for numbers in result["contenders"].values():
            if numbers.get("is_dense") and "share_of_matmul" in numbers:
                what = f"{result['dtype']} {result['direction']}"
                rates.setdefault(what, []).append(numbers["share_of_matmul"])
    if not rates:
        return []
    bounds = "; ".join(f"{what} {1 / max(rate):.2f}" for what, rate in rates.items())
    return [f"- Share of ideal if every product ran at the full matrix rate: {bounds}."]


def _attention_row(result: dict[str, Any], name: str, numbers: dict[str, Any]) -> list[str]:
    gate, seconds = numbers["gate"], numbers["seconds"]
    own = 1 if numbers["is_dense"] else numbers.get("density", result["density"])
    return [
        result["dtype"],
        result["direction"],
        "1" if numbers["is_dense"] else f"{own:.3f}",
        name,
        f"{seconds['median']:.3f} ({seconds['min']:.3f} to {seconds['max']:.3f})",
        *(
            # Without a dense contender that ran there is nothing to compare with.
            [f"{numbers['speed_up']:.2f}x", f"{numbers['share_of_ideal']:.2f}"]
            if "speed_up" in numbers
            else ["–", "–"]
        ),
        _mem(result["workload"], own),
        f"{numbers['share_of_matmul']:.2f}",
        f"{gate['error'] / gate['budget']:.2f}" if gate["budget"] else "0",
    ]


def _mem(name: str, density: float) -> str:
    """Plain MEM of the layer's forward, counted from its shape."""
    if name not in WORKLOADS:
        return "–"
    work = WORKLOADS[name]
    return f"{attention_work(work.grid.num_tokens, work.heads, work.dim, density).mem:.1f}"


def _stage_table(results: list[dict[str, Any]]) -> list[str]:
    rows = [
        [result["dtype"], f"{result['density']:.3f}"]
        + [f"{stage['median']:.4f}" for stage in result["stages"].values()]
        for result in results
        if "stages" in result
    ]
    head = ["forward, stages alone", "density", "reorder, s", "map, s", "attention, s"]
    return [*table(head, rows), ""] if rows else []


def _map_tables(results: list[dict[str, Any]]) -> list[str]:
    lines = []
    for result in results:
        if "times_slower_than_ours" in result:
            rows = [
                [name, f"{result['seconds'][name]['median']:.4f}", f"{ratio:.2f}x"]
                for name, ratio in result["times_slower_than_ours"].items()
            ]
            differ = "; ".join(f"{n}: {c}" for n, c in result["differing_entries"].items())
            lines += table([f"map, {result['algorithm']}", "seconds", "of ours"], rows)
            lines += [f"Entries that differ from ours, of {result['entries']:,}: {differ}.", ""]
        elif "map_share_of_dense" in result:
            share = f"{result['map_share_of_dense']:.2%}"
            lines += [f"The map takes {share} of dense attention's time ({result['dtype']}).", ""]
    return lines


def _scaling_table(result: dict[str, Any]) -> list[str]:
    names = ("dense", "sparse", "map")
    rows = [
        [f"{point['tokens']:,}", f"{point['density']:.3f}"]
        + [f"{point['seconds'][name]:.4f}" if name in point["seconds"] else "" for name in names]
        for point in result["points"]
    ]
    fitted = ", ".join(f"{name} {value:.2f}" for name, value in result["exponents"].items())
    return [*table(["tokens", "density", *names], rows), f"Fitted exponents: {fitted}.", ""]


def _crossover_table(results: list[dict[str, Any]]) -> list[str]:
    rows = [[f"{p['tokens']:,}", f"{p['density']:.2f}", f"{p['speed_up']:.2f}x"] for p in results]
    found = min_tokens(results)
    verdict = f"from {found:,} tokens on" if found else "at none of these lengths"
    return [
        *table(["tokens", "density", "speed-up over dense"], rows),
        f"At density 0.3 or less, sparse wins {verdict}.",
        "",
    ]


def _model_table(results: list[dict[str, Any]]) -> list[str]:
    head = ["tokens", "layers", "density", "dense, s", "sparse, s", "speed-up"]
    rows = [
        [
            f"{r['tokens']:,}",
            str(r["layers"]),
            f"{r['density']:.2f}",
            f"{r['seconds']['dense']['median']:.3f}",
            f"{r['seconds']['sparse']['median']:.3f}",
            f"{r['speed_up']:.2f}x",
            f"{r['amdahl_bound']:.2f}x",
        ]
        for r in results
    ]
    return [
        *table([*head, "bound by operations"], rows),
        "The bound counts operations, as Amdahl's law does if all run at one rate. Where dense "
        "attention runs below that rate, skipping it gains more.",
        "",
    ]
