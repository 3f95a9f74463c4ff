"""Algorithms measured on attention calls: kept mass, error and seconds.

All densities of a method are timed in one process, call by call in turn, and a reference beside
them: what the machine did meanwhile cancels in the ratio of the two.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from nabla_attn.attention import attend
from nabla_attn.block_selection import select_blocks
from nabla_attn.config import SparseConfig, parse
from nabla_attn.core.block_map import BlockMap
from nabla_attn.core.order import to_blocks
from nabla_attn.core.tail import build_tail, tail_density
from nabla_attn.evaluation.calls import Call, Series, Tables

REFERENCE = "topk-0.1"
"""Timed before every call of every method."""


@dataclass(frozen=True, eq=False)
class Measured:
    """One algorithm on one call.

    Attributes:
        density: Kept token pairs over all, summaries of a tail included.
        recall: Probability of exact attention inside the kept blocks, of every head.
        error: Distance of the output from dense over the length of the latter, of every head.
        distance: That distance over the square root of the output's number of values.
        select_seconds: Seconds that choosing took.
        seconds: Seconds of the whole attention, choosing included.
    """

    density: float
    recall: Tensor
    error: Tensor
    distance: Tensor
    select_seconds: float
    seconds: float


class Runner:
    """An algorithm that follows a series of calls, with what its methods keep between them.

    Args:
        config: The algorithm.
        tables: The table of its method, where that needs one.
    """

    def __init__(self, config: SparseConfig, tables: Tables | None = None) -> None:
        self._config, self._tables = config, tables or {}
        self._memory: dict[str, Any] = {}

    def density(self, call: Call) -> float:
        """The density of the map alone."""
        layout = call.laid_out(self._config)
        options: dict[str, Any] = {"v": call.v, "is_raster": True, "text_valid": call.text_valid}
        options |= {"scale": call.scale} | self._options(call)
        found = select_blocks(call.q, call.k, layout, self._config, **options)
        has_finish = found.treatment is not None and found.treatment.finish is not None
        if has_finish and "memory" in self._config.needs:
            # What it remembers of a call may come from the call's output.
            self._attend(call, lambda *args, **options: found)
        return found.density

    def measure(self, call: Call) -> Measured:
        """Mass, error and seconds of one call."""
        out, block_map, chosen, seconds = self._run(call)
        if block_map is None:
            ones = torch.ones(call.q.shape[1])
            return Measured(1.0, ones, 0 * ones, 0 * ones, 0.0, seconds)
        density = block_map.density + self._tail_density(call, block_map)
        recall = call.mass_of(block_map, call.laid_out(self._config))
        away = (call.video(out) - call.dense).norm(dim=1)
        error = away / call.dense.norm(dim=1)
        return Measured(density, recall, error, away / call.dense.shape[1] ** 0.5, chosen, seconds)

    def _tail_density(self, call: Call, block_map: BlockMap) -> float:
        """What the summaries of a tail count as, apart from the run that is timed."""
        if self._config.tail is None:
            return 0.0
        layout = call.laid_out(self._config)
        k, v = (to_blocks(x, layout) for x in (call.k, call.v))
        tail = build_tail(k, v, block_map, layout, self._config.tail)
        return tail_density(tail, block_map).mean().item()

    def seconds(self, call: Call) -> float:
        """Seconds of one call."""
        return self._run(call)[3]

    def _run(self, call: Call) -> tuple[Tensor, BlockMap | None, float, float]:
        """The output, its map, and seconds of choosing and of all."""
        spent = 0.0

        choose: Callable[..., BlockMap] = partial(select_blocks, **self._options(call))

        def select(*args: Any, **options: Any) -> BlockMap:
            nonlocal spent
            start = time.perf_counter()
            found = choose(*args, **options)
            spent = time.perf_counter() - start
            return found

        start = time.perf_counter()
        out, block_map = self._attend(call, select)
        return out, block_map, spent, time.perf_counter() - start

    def _attend(
        self, call: Call, select: Callable[..., BlockMap]
    ) -> tuple[Tensor, BlockMap | None]:
        """The output with the map that `select` gives, and that map."""
        options: dict[str, Any] = {"scale": call.scale, "text_valid": call.text_valid}
        if not self._config.is_dense:
            options["backend"] = "gather"
        with torch.no_grad():
            return attend(
                call.q, call.k, call.v, call.layout, self._config, select=select, **options
            )

    def _options(self, call: Call) -> dict[str, Any]:
        tables = {name: entries[call.moment.layer] for name, entries in self._tables.items()}
        return {"moment": call.moment, "memory": self._memory, "tables": tables}


def density_of(config: SparseConfig, series: Sequence[Series], tables: Tables | None) -> float:
    """The mean density of an algorithm's maps over the calls of some series."""
    found = []
    for calls in series:
        runner = Runner(config, tables)
        found += [runner.density(call) for call in calls]
    return fmean(found)


def measure_together(
    configs: Sequence[SparseConfig],
    series: Sequence[Series],
    *,
    tables: Sequence[Tables | None] | None = None,
    head_names: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Measure algorithms call by call in turn, the reference before each turn.

    Args:
        configs: The algorithms.
        series: The calls.
        tables: The table of each algorithm, where it needs one.
        head_names: Names of the heads where each has its own error in the result.

    Returns:
        For each algorithm its means over the calls, as records have them.
    """
    tables = tables or [None] * len(configs)
    reference = parse(REFERENCE)
    found: list[list[tuple[Call, Measured]]] = [[] for _ in configs]
    spent = []
    for calls in series:
        for config, table in zip((reference, *configs), (None, *tables), strict=True):
            if not config.is_dense:
                # Code and index tables are loaded before anything is timed.
                Runner(config, table).density(calls[0])
        runners = [Runner(*each) for each in zip(configs, tables, strict=True)]
        for call in calls:
            spent.append(Runner(reference).seconds(call))
            for runner, mine in zip(runners, found, strict=True):
                mine.append((call, runner.measure(call)))
    beside = {"reference_seconds": round(fmean(spent), 6)}
    return [summarise(mine, head_names) | beside for mine in found]


def summarise(found: Sequence[tuple[Call, Measured]], head_names: Sequence[str]) -> dict[str, Any]:
    """Means over calls; of recall and error also the worst head's, and those of half the steps."""
    measured = [each for _, each in found]
    plain: dict[str, float] = {
        name: fmean(getattr(each, name) for each in measured)
        for name in ("density", "select_seconds", "seconds")
    }
    halves: dict[str, list[Measured]] = {"early": [], "late": []}
    for call, each in found:
        step, steps = call.moment.step or 0, call.moment.num_steps or 1
        halves["early" if 2 * step < steps else "late"].append(each)
    for name, worst in (("recall", torch.amin), ("error", torch.amax), ("distance", torch.amax)):
        values = [getattr(each, name) for each in measured]
        plain[name] = fmean(value.mean().item() for value in values)
        plain[f"{name}_worst_head"] = fmean(worst(value).item() for value in values)
        for half, mine in halves.items():
            if mine:
                plain[f"{name}_{half}"] = fmean(getattr(each, name).mean().item() for each in mine)
    result: dict[str, Any] = {name: round(value, 6) for name, value in plain.items()}
    if head_names:
        errors = torch.stack([each.error for each in measured]).mean(dim=0).tolist()
        pairs = zip(head_names, errors, strict=True)
        result["error_of_heads"] = {name: round(error, 6) for name, error in pairs}
    return result
