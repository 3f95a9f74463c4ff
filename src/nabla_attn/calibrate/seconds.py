"""Seconds of attention on this machine by size, heads, tail and density, measured once.

The table is kept in a machine file; between its points lines are drawn.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nabla_attn.attention import attend
from nabla_attn.calibrate.candidates import SeenCalls
from nabla_attn.config import DENSE, SparseConfig, parse
from nabla_attn.core.grid import BlockShape, TokenGrid
from nabla_attn.core.order import TokenLayout
from nabla_attn.cost.timing import time_loops
from nabla_attn.machine import machine_file
from nabla_attn.record import RunRecord, collect_versions, describe_device
from nabla_attn.shapes import Float

KIND = "attention-seconds"
DENSITIES = (0.05, 0.2, 0.5)
"""Shares of blocks at which sparse attention is timed; between them and beyond, lines are drawn."""

ALIKE = ("nabla", "topk", "sta")
"""Methods whose seconds differ by their density alone."""

ANY_SHARE = 0.5  # stands for any density in the names of rules

Point = tuple[str, int, float]
"""Rules of a map besides its density, number of heads, share of blocks; dense has "dense" and 1."""


def clock_of(device: torch.device) -> Callable[[], float]:
    """The clock for work on a device.

    One thread of a CPU is timed by its own seconds, which leave out waiting for other programs.
    """
    is_one_thread = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if is_one_thread else time.perf_counter


@dataclass
class SecondsTable:
    """Seconds of one attention call of a model's size on this machine.

    Args:
        seen: The calls of the model.
        device: The device.
        backend: The backend's name.
    """

    seen: SeenCalls
    device: torch.device
    backend: str = "auto"
    points: dict[Point, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for entry in _read(self.path):
            if entry["call"] == self._call:
                point = (str(entry["rules"]), int(entry["heads"]), float(entry["density"]))
                self.points[point] = float(entry["seconds"])

    @property
    def path(self) -> Path:
        """The machine file."""
        return machine_file(KIND, self.device)

    def measure(
        self, candidates: Sequence[SparseConfig], *, on_point: Callable[[int, int], None]
    ) -> None:
        """Time what candidates need and the table lacks.

        Args:
            candidates: The algorithms.
            on_point: Called with the points that are done and all that are missing.
        """
        kinds = {_rules_of(config) for config in candidates if not config.is_dense}
        counts = sorted({1, self.seen.heads})
        wanted = [("dense", heads, 1.0) for heads in counts]
        for rules in sorted(kinds):
            wanted += product([rules], counts, _shares(rules))
        missing = [point for point in wanted if point not in self.points]
        for done, point in enumerate(missing):
            on_point(done, len(missing))
            self.points[point] = self._time(point)
            self._save()
        if missing:
            on_point(len(missing), len(missing))

    def seconds(
        self, config: SparseConfig, density: Float[np.ndarray, "..."] | float, heads: int
    ) -> np.ndarray:
        """Seconds of one call of some heads.

        Args:
            config: Their algorithm.
            density: The share of pairs that they keep, in the mean over heads.
            heads: Their number.
        """
        few, many = (self._line(config, density, count) for count in (1, self.seen.heads))
        if self.seen.heads == 1:
            return few
        share = (heads - 1) / (self.seen.heads - 1)
        return few + share * (many - few)

    def of_choice(
        self, candidates: Sequence[SparseConfig], density: np.ndarray, picked: np.ndarray
    ) -> float:
        """Seconds of all attention of a run, heads that share an algorithm in one call.

        Args:
            candidates: The algorithms.
            density: What each keeps, [steps, layers, heads, candidates].
            picked: Index of the candidate, [steps, layers, heads].
        """
        total = 0.0
        for step, layer in np.ndindex(picked.shape[:2]):
            row = picked[step, layer]
            for number in np.unique(row):
                heads = np.flatnonzero(row == number)
                kept = density[step, layer, heads, number].mean()
                total += float(self.seconds(candidates[number], kept, len(heads)))
        return total * self.seen.calls / picked.shape[0]

    def by_candidate(self, candidates: Sequence[SparseConfig], density: np.ndarray) -> np.ndarray:
        """A head's share of seconds for each candidate, [steps, layers, heads, candidates].

        It is what the head costs in one call of all heads.
        """
        heads = self.seen.heads
        costs = [
            self.seconds(config, density[..., number], heads) * np.ones(density.shape[:3])
            for number, config in enumerate(candidates)
        ]
        return np.stack(costs, axis=-1) * self.seen.calls / (density.shape[0] * heads)

    def _line(self, config: SparseConfig, density: Any, heads: int) -> np.ndarray:
        if config.is_dense:
            return np.full(np.shape(density), self.points["dense", heads, 1.0])
        rules = _rules_of(config)
        x = np.array(_shares(rules))
        if len(x) == 1:
            return np.full(np.shape(density), self.points[rules, heads, x[0]])
        if config.tail is not None:
            # Densities count the summaries of what is dropped.
            x = x + (1 - x) / BlockShape(*(config.block or ())).tokens
        y = np.array([self.points[rules, heads, share] for share in _shares(rules)])
        # Beyond the last points the outer lines go on.
        last = np.clip(np.searchsorted(x, density), 1, len(x) - 1)
        slope = (y[last] - y[last - 1]) / (x[last] - x[last - 1])
        return np.maximum(y[last - 1] + slope * (density - x[last - 1]), y[0] * 0.5)

    def _time(self, point: Point) -> float:
        rules, heads, share = point
        config = DENSE if rules == "dense" else _with_rules(rules, share)
        seen = self.seen
        count = int(np.prod(seen.tokens)) + sum(seen.text)
        generator = torch.Generator().manual_seed(0)
        shape = (seen.batch, heads, count, seen.dim)
        dtype = getattr(torch, seen.dtype)
        q, k, v = (torch.randn(shape, generator=generator).to(self.device, dtype) for _ in range(3))
        layout = TokenLayout(TokenGrid(*seen.tokens), *seen.text)

        @torch.no_grad()
        def run() -> None:
            attend(q, k, v, layout, config, backend=self.backend, measure=True)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

        clock = clock_of(self.device)
        timed = time_loops({"attend": run}, rounds=4, max_rounds=12, clock=clock)
        return timed["attend"].least

    @property
    def _call(self) -> dict[str, Any]:
        names = ("batch", "dim", "dtype")
        values = {name: getattr(self.seen, name) for name in names} | {"backend": self.backend}
        return values | {"text": list(self.seen.text), "tokens": list(self.seen.tokens)}

    def _save(self) -> None:
        others = [entry for entry in _read(self.path) if entry["call"] != self._call]
        mine = [
            {"call": self._call, "rules": rules, "heads": heads, "density": share, "seconds": s}
            for (rules, heads, share), s in self.points.items()
        ]
        RunRecord(
            kind=KIND,
            config={"densities": list(DENSITIES)},
            seed=0,
            versions=collect_versions(),
            device=describe_device(self.device),
            numbers={"points": others + mine},
        ).save(self.path)


def _read(path: Path) -> list[dict[str, Any]]:
    """The points of a machine file; none where there is no file.

    Raises:
        ValueError: The file is no table.
    """
    if not path.is_file():
        return []
    record = RunRecord.load(path)
    points = record.numbers.get("points")
    names = {"call", "rules", "heads", "density", "seconds"}
    if record.kind != KIND or not isinstance(points, list) or any(names - set(p) for p in points):
        raise ValueError(f"{path} is not a table of attention's seconds. Remove it.")
    return points


def _rules_of(config: SparseConfig) -> str:
    """What of an algorithm its seconds depend on besides density: blocks, pairing and tail.

    Methods whose maps cost more than those of pooled blocks are timed as they are, on random
    tokens.
    """
    if any(use.name not in ALIKE for use in config.uses):
        return str(config)
    bare = replace(config, uses=SparseConfig(topk=ANY_SHARE).uses, keep_first_frame=False)
    return str(bare)


def _shares(rules: str) -> tuple[float, ...]:
    """The shares of blocks at which rules are timed; 1 stands for what a method keeps itself."""
    return DENSITIES if parse(rules).topk == ANY_SHARE else (1.0,)


def _with_rules(rules: str, share: float) -> SparseConfig:
    config = parse(rules)
    if _shares(rules) != DENSITIES:
        return config
    return replace(config, uses=SparseConfig(topk=share).uses)
