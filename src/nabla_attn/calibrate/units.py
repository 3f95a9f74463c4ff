"""Units that choose an algorithm each (heads of layers in ranges of steps), and their choice."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from nabla_attn.calibrate.candidates import CandidateLosses
from nabla_attn.config import SparseConfig
from nabla_attn.cost.choose import choose
from nabla_attn.head_rules import Rule
from nabla_attn.schedule import Schedule

BY = ("head", "layer")


@dataclass(frozen=True)
class Units:
    """The units of a model: every layer, or every head of it, in every range of steps.

    Attributes:
        shape: Steps, layers and heads.
        ranges: Number of equal ranges of steps; no more than there are steps.
        by: "head" or "layer".

    Raises:
        ValueError: A value is none of these.
    """

    shape: tuple[int, int, int]
    ranges: int = 1
    by: str = "head"

    def __post_init__(self) -> None:
        if self.by not in BY:
            raise ValueError(f"units are chosen by head or by layer: got {self.by!r}.")
        if not 1 <= self.ranges <= self.shape[0]:
            raise ValueError(
                f"{self.shape[0]} steps make 1 to {self.shape[0]} ranges: got {self.ranges}."
            )

    @property
    def numbers(self) -> np.ndarray:
        """The unit of every step, layer and head, int [steps, layers, heads]."""
        steps, layers, heads = self.shape
        parts = np.array_split(np.arange(steps), self.ranges)
        of_step = np.repeat(np.arange(self.ranges), [len(part) for part in parts])
        columns = heads if self.by == "head" else 1
        of_head = np.arange(heads) if self.by == "head" else np.zeros(heads, int)
        of_layer = np.arange(layers)[:, None] * columns + of_head
        return of_step[:, None, None] * layers * columns + of_layer

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sums [units, candidates] of values [steps, layers, heads, candidates]."""
        numbers = self.numbers.ravel()
        total = np.zeros((numbers.max() + 1, values.shape[-1]))
        np.add.at(total, numbers, values.reshape(len(numbers), -1))
        return total


@dataclass(frozen=True)
class Choice:
    """An algorithm for each step, layer and head, and what they keep and lose.

    Attributes:
        picked: Index of the candidate, int [steps, layers, heads].
        density: Scores computed over all pairs of tokens, mean over steps, layers and heads.
        error: Relative error of attention's output, likewise.
    """

    picked: np.ndarray
    density: float
    error: float


def choose_within(
    losses: CandidateLosses,
    units: Units,
    *,
    budget: float,
    spent: np.ndarray,
    cost: np.ndarray,
) -> Choice:
    """The choice with the least cost whose spending stays within a budget, exactly.

    Args:
        losses: What was measured.
        units: What chooses.
        budget: What all may spend together.
        spent: What each candidate spends, [steps, layers, heads, candidates].
        cost: What it costs, likewise.

    Raises:
        ValueError: Nothing stays within the budget.
    """
    picked = choose(units.sums(cost), units.sums(spent), budget)
    return choice_of(losses, picked[units.numbers])


def choice_of(losses: CandidateLosses, picked: np.ndarray) -> Choice:
    """A choice with what it keeps and loses."""
    density, error = (taken(values, picked).mean() for values in (losses.density, losses.error))
    return Choice(picked, float(density), float(error))


def one_for_all(losses: CandidateLosses) -> list[Choice]:
    """Each candidate everywhere: what a choice by unit is to be compared with."""
    *shape, count = losses.density.shape
    return [choice_of(losses, np.full(shape, number)) for number in range(count)]


def taken(values: np.ndarray, picked: np.ndarray) -> np.ndarray:
    """Values [steps, layers, heads, candidates] of the picked candidates."""
    return np.take_along_axis(values, picked[..., None], axis=-1)[..., 0]


def to_schedule(
    picked: np.ndarray, candidates: Sequence[SparseConfig], rules: Schedule | None = None
) -> Schedule:
    """The schedule of a choice, with few rules.

    Args:
        picked: Index of the candidate, [steps, layers, heads].
        candidates: The algorithms.
        rules: A schedule whose rules stay; its algorithm is replaced.
    """
    algorithm = candidates[Counter(picked.ravel().tolist()).most_common(1)[0][0]]
    # (layer, heads, candidate) -> steps, then (heads, candidate, steps) -> layers.
    steps: dict[tuple[int, tuple[int, ...], int], list[int]] = {}
    for step, layer in np.ndindex(picked.shape[:2]):
        for number in dict.fromkeys(picked[step, layer].tolist()):
            if candidates[number] != algorithm:
                heads = tuple(np.flatnonzero(picked[step, layer] == number).tolist())
                steps.setdefault((layer, heads, number), []).append(step)
    layers: dict[tuple[tuple[int, ...], int, tuple[int, ...]], list[int]] = {}
    for (layer, heads, number), some in steps.items():
        layers.setdefault((heads, number, tuple(some)), []).append(layer)
    found = [
        Rule(
            algorithm=candidates[number],
            layers=_unless_all(some, picked.shape[1]),
            heads=_unless_all(heads, picked.shape[2]),
            steps=_unless_all(during, picked.shape[0]),
        )
        for (heads, number, during), some in sorted(layers.items(), key=_place)
    ]
    base = Schedule(algorithm=algorithm) if rules is None else rules
    return replace(base, algorithm=algorithm, rules=tuple(found))


def _place(entry: tuple[tuple[tuple[int, ...], int, tuple[int, ...]], list[int]]) -> tuple:
    """Where a rule stands: by layers, then steps, then heads."""
    (heads, _, during), layers = entry
    return tuple(layers), during, heads


def _unless_all(numbers: Sequence[int], count: int) -> tuple[int, ...] | None:
    return None if len(numbers) == count else tuple(numbers)
