"""The algorithms that layers may use, what each loses in a layer, and the choice of one."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nabla_attn.config import DENSE, SparseConfig, parse
from nabla_attn.core.losses import measure_losses
from nabla_attn.cost.choose import choose
from nabla_attn.models import AttentionCall

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7)
DEFAULT = ("nabla-*", "topk-*", "nabla-*_sta-3-3-3")


def read_candidates(texts: Iterable[str]) -> list[SparseConfig]:
    """Algorithms of strings in which a `*` stands for `THRESHOLDS` or `SHARES`; dense goes last.

    Raises:
        ValueError: A string is no algorithm, or none is given.
    """
    configs: list[SparseConfig] = []
    for text in texts:
        numbers = SHARES if "topk" in text else THRESHOLDS
        filled = [text.replace("*", str(number)) for number in numbers] if "*" in text else [text]
        configs += map(parse, filled)
    configs = list(dict.fromkeys(config for config in configs if not config.is_dense))
    if not configs:
        raise ValueError("there is nothing to choose from: pass an algorithm such as nabla-*.")
    return [*configs, DENSE]


@dataclass(frozen=True)
class CandidateLosses:
    """Means over steps, calls and heads, float64 [layers, candidates].

    Where a rule of the schedule keeps a layer dense in a step, all candidates count as dense.

    Attributes:
        density: Kept token pairs over all.
        error: Distance of the sparse from the exact output over the length of the latter.
    """

    density: np.ndarray
    error: np.ndarray


class CandidateProbe:
    """Measures candidates on the queries and keys of sparse calls.

    Give `attach` to `generate(on_apply=...)` with an algorithm that keeps every block: the run
    itself then loses nothing, and no candidate is measured on what another one changed.

    Args:
        candidates: Algorithms; dense is known and not measured.
        num_steps: Denoising steps of the run.
        num_rows: Query tokens sampled per call.
    """

    def __init__(
        self, candidates: Sequence[SparseConfig], num_steps: int, *, num_rows: int = 16
    ) -> None:
        self._candidates = candidates
        self._num_steps = num_steps
        self._num_rows = num_rows

    def attach(self, handle: Any) -> None:
        """Observe all layers of a handle."""
        layers = handle.num_layers
        self._sums = np.zeros((2, self._num_steps, layers, len(self._candidates)))
        self._calls = np.zeros((self._num_steps, layers, 1))
        handle.observe(self._observe)

    def losses(self) -> CandidateLosses:
        """The means of the run."""
        means = self._sums / self._calls.clip(min=1)
        for mean, dense in zip(means, (1.0, 0.0), strict=True):
            mean[self._calls[..., 0] == 0] = dense
        return CandidateLosses(*means.mean(axis=1))

    def _observe(self, seen: AttentionCall) -> None:
        step, index = seen.step, seen.layer
        assert step is not None
        for number, config in enumerate(self._candidates):
            density, error = 1.0, 0.0
            if not config.is_dense:
                call = seen.last_sample(config)
                # The same tokens for all candidates, so that they differ in nothing else.
                lost = measure_losses(call, num_rows=self._num_rows, seed=step * 1000 + index)
                density, error = call.block_map.density, lost.output_error.mean().item()
            self._sums[:, step, index, number] += density, error
        self._calls[step, index] += 1


@dataclass(frozen=True)
class Choice:
    """Algorithms of layers, and what they keep and lose, means over layers.

    Attributes:
        layers: The algorithm of each layer.
        density: Kept token pairs over all.
        error: Relative error of attention's output.
    """

    layers: tuple[SparseConfig, ...]
    density: float
    error: float


def choose_within(
    losses: CandidateLosses,
    candidates: Sequence[SparseConfig],
    *,
    density: float | None = None,
    error: float | None = None,
) -> Choice:
    """The least error at no more than a density, or the least density at no more than an error.

    Args:
        losses: What was measured.
        candidates: The algorithms of its last axis.
        density: The budget; or
        error: The budget.

    Raises:
        ValueError: Not one budget, or nothing stays within it; the least that can be is named.
    """
    if (density is None) == (error is None):
        raise ValueError("pass one budget: a density or an error.")
    if density is not None:
        picked = _least(losses.error, losses.density, density, "density")
    else:
        picked = _least(losses.density, losses.error, error, "error")
    return _choice(losses, candidates, picked)


def one_for_all(losses: CandidateLosses, candidates: Sequence[SparseConfig]) -> list[Choice]:
    """Each candidate in all layers: what a choice by layer is to be compared with."""
    layers, count = losses.density.shape
    return [_choice(losses, candidates, np.full(layers, number)) for number in range(count)]


def _least(cost: np.ndarray, spent: np.ndarray, budget: float | None, name: str) -> np.ndarray:
    """A candidate for each layer: the smallest mean cost, exactly, at a mean spent in budget."""
    least = spent.min(axis=1).mean()
    if budget is None or not budget >= least:
        raise ValueError(
            f"a mean {name} of {budget} is not possible: these algorithms reach {least:.4g}. "
            "Ask for more, or pass others."
        )
    return choose(cost, spent, budget * len(spent))


def _choice(
    losses: CandidateLosses, candidates: Sequence[SparseConfig], picked: np.ndarray
) -> Choice:
    layers = np.arange(len(picked))
    return Choice(
        tuple(candidates[number] for number in picked),
        float(losses.density[layers, picked].mean()),
        float(losses.error[layers, picked].mean()),
    )
