"""Search within a latency band: short trainings, successive halving, evolution."""

import math
import random
import statistics
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from isynet.architecture import Architecture
from isynet.counting import count as count_work
from isynet.data.source import ImageSource
from isynet.latency import LatencyTable
from isynet.runs import SEARCH_RECORD, TrialFolder
from isynet.space import SearchSpace
from isynet.training.recipe import Recipe
from isynet.training.trial import split, train_briefly
from nabla_attn.progress import ProgressCallback, ignore_progress

MAX_DRAWS = 20_000
"""Architectures drawn for one within the band before the search gives up."""

WALK_STEPS = 300
"""Changes tried on a random architecture before another one is drawn."""

MAX_WALKS = 50
"""Walks to the band before a search that found no architecture within it gives up."""

ESTIMATE_ERROR = 1.25
"""Factor by which an estimate may lie outside of the band before blocks are measured."""


@dataclass(frozen=True)
class SearchPlan:
    """How long a search is.

    Attributes:
        population: Architectures of a generation.
        generations: Number of generations; the first is drawn at random, others from the best.
        parents: Number of best architectures that others are made from.
        rungs: Number of training lengths. Of a generation all are trained for the first.
        keep: The best of a rung, one in this many, go on to the next.
        growth: Steps of a rung over steps of the one before.
        validation: Images held out of the training set, which decide.
    """

    population: int = 16
    generations: int = 4
    parents: int = 4
    rungs: int = 3
    keep: int = 4
    growth: int = 4
    validation: int = 4000

    def __post_init__(self) -> None:
        if self.population < 2 or self.keep < 2 or self.growth < 1:
            raise ValueError(
                "a search needs a population and a keep of 2 or more and a growth of 1 or more: "
                f"got {self.population}, {self.keep} and {self.growth}."
            )
        if min(self.generations, self.parents, self.rungs, self.validation) < 1:
            raise ValueError("generations, parents, rungs and validation must be 1 or more.")


@dataclass(frozen=True)
class Candidate:
    """An architecture that was tried.

    Attributes:
        architecture: The architecture.
        rung: Longest training it got, from 0.
        accuracy: Share of the validation images that it names after that training.
        loss: Mean training loss of the last tenth of the steps.
        seconds: Predicted seconds an image.
    """

    architecture: Architecture
    rung: int
    accuracy: float
    loss: float
    seconds: float

    @property
    def rank(self) -> tuple[int, float, float]:
        """Longer training first, then accuracy, then a low loss."""
        return self.rung, self.accuracy, -self.loss


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        best: The best architecture.
        candidates: All that were tried, best first.
    """

    best: Architecture
    candidates: list[Candidate]


def search(
    space: SearchSpace,
    source: ImageSource,
    table: LatencyTable,
    *,
    latency: tuple[float, float],
    folder: str | Path,
    recipe: Recipe,
    plan: SearchPlan | None = None,
    seed: int = 0,
    on_progress: ProgressCallback = ignore_progress,
) -> Found:
    """Search for the architecture that learns best within a latency band.

    The band is a hard filter: what lies outside by the block table is never trained. Short training
    decides, on images held out of the training set. The paper's own search is not known; this one
    is reconstructed from what its abstract promises.

    Every trial is recorded when it ends, and what comes next follows from seed and records: a
    search that is killed and started again gives the same result.

    Args:
        space: What may be drawn.
        source: Training images; the last `plan.validation` of a shuffle are held out.
        table: Latencies; its file should lie in the folder or be kept otherwise.
        latency: Least and most seconds an image.
        folder: Where settings and trials are kept.
        recipe: The training of the first rung; later rungs have more steps and warm-up.
        plan: How long the search is.
        seed: Seed of draws, order and initial weights.
        on_progress: Called after every trial.

    Raises:
        ValueError: The folder holds a search with other settings, or no architecture of the space
            lies within the band.
    """
    plan = plan or SearchPlan()
    trials = TrialFolder(
        folder,
        "isynet-search",
        {
            "space": space.to_dict(),
            "images": [len(source), source.size, *source.classes],
            "conditions": vars(table.conditions),
            "latency": list(latency),
            "recipe": recipe.to_dict(),
            "plan": asdict(plan),
            "seed": seed,
        },
    )
    fit, held_out = split(source, plan.validation, seed)
    found: dict[Architecture, Candidate] = {}
    total = plan.generations * sum(_rung_sizes(plan))
    done = 0
    for generation in range(plan.generations):
        current = [
            Candidate(each, -1, 0.0, 0.0, table.seconds(each))
            for each in _draw(space, table, latency, plan, found, seed, generation)
        ]
        for rung, size in enumerate(_rung_sizes(plan)):
            current = sorted(current, key=lambda each: each.rank, reverse=True)[:size]
            longer = lengthen(recipe, plan.growth**rung)
            for place, candidate in enumerate(current):
                config = {"architecture": str(candidate.architecture), "rung": rung}
                numbers = trials.trial(
                    f"{generation:03d}-{rung}-{place:03d}",
                    config,
                    partial(train_briefly, candidate.architecture, longer, fit, held_out, seed),
                )
                current[place] = replace(
                    candidate, rung=rung, accuracy=numbers["accuracy"], loss=numbers["loss"]
                )
                found[candidate.architecture] = current[place]
                done += 1
                on_progress(f"generation {generation + 1}, rung {rung + 1}", done, total)
    ranked = sorted(found.values(), key=lambda each: each.rank, reverse=True)
    _save_result(trials, ranked)
    return Found(ranked[0].architecture, ranked)


def lengthen(recipe: Recipe, factor: int) -> Recipe:
    """The recipe with its steps and warm-up multiplied."""
    return replace(recipe, steps=recipe.steps * factor, warmup=recipe.warmup * factor)


def _rung_sizes(plan: SearchPlan) -> list[int]:
    """Architectures of a generation at each rung; at least one reaches the last."""
    return [max(1, plan.population // plan.keep**rung) for rung in range(plan.rungs)]


def _draw(
    space: SearchSpace,
    table: LatencyTable,
    latency: tuple[float, float],
    plan: SearchPlan,
    found: dict[Architecture, Candidate],
    seed: int,
    generation: int,
) -> list[Architecture]:
    """New architectures within the band: at random at first, then changed from the best."""
    rng = random.Random(f"{seed} {generation}")
    parents = sorted(found.values(), key=lambda each: each.rank, reverse=True)[: plan.parents]
    estimate = _Estimate(table)
    for parent in parents:
        estimate.learn(parent.architecture)
    low, high = latency
    drawn: list[Architecture] = []
    draws = 0
    while draws < (MAX_DRAWS if drawn or parents else MAX_WALKS):
        draws += 1
        if parents:
            architecture = space.mutate(rng.choice(parents).architecture, rng)
        else:
            architecture = _walk(space, estimate, latency, rng)
        if architecture in found or architecture in drawn:
            continue
        near = estimate.seconds(architecture)
        if not low / ESTIMATE_ERROR <= near <= high * ESTIMATE_ERROR:
            continue
        if low <= estimate.learn(architecture) <= high:
            drawn.append(architecture)
            if len(drawn) == plan.population:
                return drawn
    raise ValueError(
        f"only {len(drawn)} of {draws} architectures take {latency[0] * 1e3:.4g} to "
        f"{latency[1] * 1e3:.4g} ms an image. Widen the band or change the space."
    )


class _Estimate:
    """Seconds by counted work and the rate of networks before: no block need be measured."""

    def __init__(self, table: LatencyTable) -> None:
        self._table = table
        self._rates: list[float] = []
        self._known: dict[Architecture, float] = {}

    def learn(self, architecture: Architecture) -> float:
        """Seconds by the table, which tell the rate of the next ones."""
        seconds = self._table.seconds(architecture)
        self._rates.append(self._matrix(architecture) / max(seconds, 1e-12))
        return seconds

    def seconds(self, architecture: Architecture) -> float:
        """Estimated seconds an image."""
        if not self._rates:
            self.learn(architecture)
        return self._matrix(architecture) / statistics.median(self._rates[-5:])

    def _matrix(self, architecture: Architecture) -> float:
        if architecture not in self._known:
            now = self._table.conditions
            work = count_work(
                architecture, now.size, in_chans=now.in_chans, num_classes=now.num_classes
            )
            self._known[architecture] = work.matrix
        return self._known[architecture]


def _walk(
    space: SearchSpace, estimate: _Estimate, latency: tuple[float, float], rng: random.Random
) -> Architecture:
    """A random architecture, changed step by step until its estimate lies within the band.

    Nearly all architectures of a space are far from any one band.
    """
    middle = math.sqrt(max(latency[0], latency[1] / 2) * latency[1])
    architecture = space.sample(rng)
    now = estimate.seconds(architecture)
    for _ in range(WALK_STEPS):
        if latency[0] <= now <= latency[1]:
            break
        other = space.mutate(architecture, rng)
        then = estimate.seconds(other)
        if abs(math.log(then / middle)) < abs(math.log(now / middle)):
            architecture, now = other, then
    return architecture


def _save_result(trials: TrialFolder, ranked: list[Candidate]) -> None:
    rows = [{**asdict(each), "architecture": str(each.architecture)} for each in ranked]
    numbers = {"best": str(ranked[0].architecture), "candidates": rows}
    trials.save(trials.folder / SEARCH_RECORD, trials.settings, numbers)
