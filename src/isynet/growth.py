"""Scaling: which stages get more blocks for a latency, by gain and measured milliseconds."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from isynet.architecture import MAX_BLOCKS, Architecture
from isynet.data.source import ImageSource
from isynet.latency import LatencyTable
from isynet.runs import TrialFolder
from isynet.training.recipe import Recipe
from isynet.training.trial import split, train_briefly
from nabla_attn.cost.choose import choose
from nabla_attn.progress import ProgressCallback, ignore_progress

MAX_ADDED = 16
"""Most blocks that scaling adds to a stage."""


@dataclass(frozen=True)
class Scaled:
    """A network scaled to a latency.

    Attributes:
        architecture: The architecture.
        budget: Seconds an image that it may take.
        seconds: Predicted seconds an image.
        gain: Predicted gain over the network it came from, in the unit of the gains.
    """

    architecture: Architecture
    budget: float
    seconds: float
    gain: float


@dataclass(frozen=True)
class ScalePlan:
    """How the gain of more blocks is measured.

    Attributes:
        added: Numbers of blocks added to one stage at a time.
        seeds: Number of trainings of each network.
        validation: Images held out of the training set, which decide.
    """

    added: tuple[int, ...] = (1, 3)
    seeds: int = 2
    validation: int = 4000

    def __post_init__(self) -> None:
        if not self.added or min(self.added) < 1 or self.seeds < 1 or self.validation < 1:
            raise ValueError(
                f"scaling adds 1 block or more and trains 1 time or more: got {self.added} and "
                f"{self.seeds}."
            )


def check_gains(architecture: Architecture, gains: Sequence[float]) -> None:
    """Refuse gains that a network cannot be scaled by.

    Raises:
        ValueError: Not as many gains as stages, or one that is negative or not finite.
    """
    stages = len(architecture.num_blocks)
    if len(gains) != stages or not all(0 <= gain < math.inf for gain in gains):
        raise ValueError(f"{stages} stages need as many gains, not negative: got {list(gains)}.")


def scale(
    architecture: Architecture,
    gains: Sequence[float],
    table: LatencyTable,
    budgets: Sequence[float],
) -> list[Scaled]:
    """Add blocks to the stages so that the gain is largest within each latency, exactly.

    Cells, widths and resolution stay, as in the published N1-S1 to N1-S3. The paper's algorithm is
    not known; this one is reconstructed: a stage with n blocks that gets k more gains its
    coefficient times log((n + k) / n), so gains fall, and the choice is `nabla_attn.cost.choose`.

    Args:
        architecture: The network to scale.
        gains: Coefficient of each stage, such as `measure_gains` fits; not negative.
        table: Latencies of blocks.
        budgets: Seconds an image.

    Returns:
        A network for each budget, in their order.

    Raises:
        ValueError: Not as many gains as stages, or a budget below the network's own latency.
    """
    check_gains(architecture, gains)
    counts = architecture.num_blocks
    base = table.seconds(architecture)
    pieces = table.pieces(architecture)
    options = np.arange(MAX_ADDED + 1)
    numbers = np.array(counts)[:, None] + options
    loss = -np.array(gains)[:, None] * np.log(numbers / np.array(counts)[:, None])
    loss[numbers > MAX_BLOCKS] = np.inf
    seconds = table.scale * np.array([[more] for _, more in pieces]) * options
    results = []
    for budget in budgets:
        if budget < base:
            raise ValueError(
                f"{architecture} takes {base * 1e3:.4g} ms an image already, more than "
                f"{budget * 1e3:.4g}."
            )
        # A hair for each block, so that one that gains nothing is not added for nothing.
        picked = choose(loss + 1e-12 * options, seconds, budget - base)
        grown = architecture.with_blocks(
            tuple(n + int(k) for n, k in zip(counts, picked, strict=True))
        )
        gain = -loss[np.arange(len(counts)), picked].sum()
        results.append(Scaled(grown, budget, table.seconds(grown), float(gain)))
    return results


def scale_evenly(architecture: Architecture, table: LatencyTable, budget: float) -> Architecture:
    """Deepen all stages by one factor as far as a latency allows, to compare with."""
    best = architecture
    counts = architecture.num_blocks
    for factor in np.linspace(1, 1 + MAX_ADDED, 16 * MAX_ADDED + 1):
        grown = architecture.with_blocks(
            tuple(min(MAX_BLOCKS, max(n, round(n * factor))) for n in counts)
        )
        if table.seconds(grown) > budget:
            break
        best = grown
    return best


def measure_gains(
    architecture: Architecture,
    source: ImageSource,
    *,
    folder: str | Path,
    recipe: Recipe,
    plan: ScalePlan | None = None,
    seed: int = 0,
    on_progress: ProgressCallback = ignore_progress,
) -> list[float]:
    """Measure what more blocks of each stage gain, by short trainings of it alone.

    Each training is recorded when it ends; a run that was killed goes on with the next.

    Args:
        architecture: The network.
        source: Training images, some of which are held out.
        folder: Where settings and trials are kept.
        recipe: The short training.
        plan: What is trained.
        seed: First seed.
        on_progress: Called after every training.

    Returns:
        For each stage the coefficient of log((n + k) / n) in points of accuracy on held-out images,
        fitted by least squares; 0 where more blocks do not help.

    Raises:
        ValueError: The folder holds a run with other settings.
    """
    plan = plan or ScalePlan()
    trials = TrialFolder(
        folder,
        "isynet-scale",
        {
            "architecture": str(architecture),
            "images": [len(source), source.size, *source.classes],
            "recipe": recipe.to_dict(),
            "plan": {**asdict(plan), "added": list(plan.added)},
            "seed": seed,
        },
    )
    fit, held_out = split(source, plan.validation, seed)
    counts = architecture.num_blocks
    jobs = [(0, 0), *((stage, added) for stage in range(len(counts)) for added in plan.added)]
    total, done = len(jobs) * plan.seeds, 0
    accuracy: dict[tuple[int, int], float] = {}
    for stage, added in jobs:
        grown = architecture.with_blocks(
            tuple(n + added * (place == stage) for place, n in enumerate(counts))
        )
        values = []
        for number in range(plan.seeds):
            numbers = trials.trial(
                f"stage{stage}-{added}-seed{number}",
                {"architecture": str(grown), "seed": seed + number},
                partial(train_briefly, grown, recipe, fit, held_out, seed + number),
            )
            values.append(numbers["accuracy"])
            done += 1
            on_progress(str(grown), done, total)
        accuracy[stage, added] = 100 * sum(values) / len(values)
    gains = []
    for stage, n in enumerate(counts):
        depth = np.array([math.log((n + added) / n) for added in plan.added])
        gained = np.array([accuracy[stage, added] - accuracy[0, 0] for added in plan.added])
        gains.append(max(0.0, float(depth @ gained / (depth @ depth))))
    numbers = {"gains": gains, "accuracy": accuracy[0, 0]}
    trials.save(trials.folder / "gains.json", trials.settings, numbers)
    return gains
