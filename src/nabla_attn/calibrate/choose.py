"""One candidate for each layer, within a budget."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nabla_attn.calibrate.losses import CandidateLosses
from nabla_attn.config import SparseConfig
from nabla_attn.cost.choose import choose


@dataclass(frozen=True)
class Choice:
    """Algorithms of layers, and what they keep and lose, means over layers.

    Attributes:
        layers: the algorithm of each layer.
        density: kept token pairs over all.
        error: relative error of attention's output.
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
        losses: what was measured.
        candidates: the algorithms of its last axis.
        density: the budget; or
        error: the budget.

    Raises:
        ValueError: not one budget, or nothing stays within it; the least that can be is named.
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
