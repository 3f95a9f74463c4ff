"""A schedule within a budget: of density, of attention's error, or of this machine's seconds."""

from dataclasses import dataclass, field, replace

import numpy as np

from nabla_attn.calibrate.candidates import CandidateLosses
from nabla_attn.calibrate.run import Calibration, Progress, no_progress
from nabla_attn.calibrate.seconds import SecondsTable
from nabla_attn.calibrate.units import Choice, Units, choice_of, choose_within
from nabla_attn.calibrate.weights import final_latents
from nabla_attn.generation.generate import warm_up

HALVINGS = 12
"""How closely a density is found that takes given seconds."""


@dataclass(frozen=True)
class Budget:
    """What a schedule may spend: one of four.

    Args:
        density: Scores computed over all pairs of tokens, mean over the run.
        error: Relative error of attention's output, mean over the run.
        seconds: Seconds in the transformer for a video.
        speed_up: Seconds of the dense transformer over those.

    Raises:
        ValueError: Not one of them is given, or it is not positive.
    """

    density: float | None = None
    error: float | None = None
    seconds: float | None = None
    speed_up: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ValueError(
                "calibration takes one budget: --density 0.2, --error 0.1, --seconds 30 or "
                "--speed-up 2."
            )
        (name, value), *_ = given.items()
        if not value >= 0 or (value == 0 and name != "error"):
            raise ValueError(f"{name} must be more than 0: got {value}.")

    @property
    def is_time(self) -> bool:
        """Whether it is about seconds."""
        return self.seconds is not None or self.speed_up is not None


@dataclass(frozen=True)
class Timed:
    """A choice with its seconds in the transformer.

    Attributes:
        choice: The choice.
        predicted: Seconds by the table.
        measured: Seconds of a run; None where it was not timed.
    """

    choice: Choice
    predicted: float
    measured: float | None = None


@dataclass
class TimeBudget:
    """Choices within seconds of the transformer.

    Args:
        calibration: What was measured.
        losses: The losses.
        units: What chooses.
        cost: What a choice costs, [steps, layers, heads, candidates].
        table: Seconds of attention on this machine.
        prompt: The prompt that is timed.
        progress: From a label to what is told about the stages of a run.
    """

    calibration: Calibration
    losses: CandidateLosses
    units: Units
    cost: np.ndarray
    table: SecondsTable
    prompt: str
    progress: Progress = no_progress
    dense: Timed = field(init=False)
    rest: float = field(init=False)

    def __post_init__(self) -> None:
        candidates = self.calibration.candidates
        dense = choice_of(self.losses, np.full(self.units.shape, len(candidates) - 1))
        attention = self._attention(dense.picked)
        measured = self._run(None, "dense")
        self.rest = measured - attention
        self.dense = Timed(dense, measured, measured)

    def choose(self, seconds: float) -> Timed:
        """The least cost within seconds of the transformer.

        Raises:
            ValueError: Too few seconds; the least that can be is named.
        """
        spent = self.table.by_candidate(self.calibration.candidates, self.losses.density)
        allowed = seconds - self.rest
        limit = allowed
        for _ in range(HALVINGS):
            try:
                choice = choose_within(
                    self.losses, self.units, budget=limit, spent=spent, cost=self.cost
                )
            except ValueError:
                least = self.units.sums(spent).min(axis=1).sum() + self.rest
                raise ValueError(
                    f"{seconds:.4g} seconds in the transformer are not possible: dense takes "
                    f"{self.dense.predicted:.4g}, everything but attention {self.rest:.4g}, and "
                    f"these algorithms reach about {least:.4g}. Allow more, or pass others."
                ) from None
            over = self._attention(choice.picked) - allowed
            if over <= 1e-3 * seconds:
                break
            # Several groups of heads take longer than one call of all of them.
            limit -= over
        return Timed(choice, self._attention(choice.picked) + self.rest)

    def of_density(self, seconds: float) -> Timed:
        """The choice by density alone whose predicted seconds are these."""
        density = self.losses.density
        low = self.units.sums(density).min(axis=1).sum() / density[..., 0].size
        high, found = 1.0, None
        for _ in range(HALVINGS):
            budget = (low + high) / 2
            choice = choose_by_density(self.losses, self.units, self.losses.error, budget)
            timed = Timed(choice, self._attention(choice.picked) + self.rest)
            low, high = (budget, high) if timed.predicted <= seconds else (low, budget)
            if found is None or timed.predicted <= seconds:
                found = timed
        assert found is not None
        return found

    def measure(self, timed: Timed, label: str) -> Timed:
        """The same with the seconds of a run."""
        return replace(timed, measured=self._run(timed.choice.picked, label))

    def _attention(self, picked: np.ndarray) -> float:
        return self.table.of_choice(self.calibration.candidates, self.losses.density, picked)

    def _run(self, picked: np.ndarray | None, label: str) -> float:
        schedule = None if picked is None else self.calibration.schedule(picked)
        run = self.calibration.run_of(self.prompt, schedule)
        warm_up(self.calibration.pipeline, run)
        return final_latents(self.calibration.pipeline, run, self.progress(label))[1]


def choose_by_density(
    losses: CandidateLosses, units: Units, cost: np.ndarray, density: float
) -> Choice:
    """The least cost at no more than a mean density."""
    size = losses.density[..., 0].size
    return _within(losses, units, density * size, losses.density, cost, f"a density of {density}")


def choose_by_error(losses: CandidateLosses, units: Units, error: float) -> Choice:
    """The least density at no more than a mean error."""
    size = losses.density[..., 0].size
    return _within(
        losses, units, error * size, losses.error, losses.density, f"an error of {error}"
    )


def _within(
    losses: CandidateLosses,
    units: Units,
    budget: float,
    spent: np.ndarray,
    cost: np.ndarray,
    asked: str,
) -> Choice:
    try:
        return choose_within(losses, units, budget=budget, spent=spent, cost=cost)
    except ValueError:
        least = units.sums(spent).min(axis=1).sum() / spent[..., 0].size
        raise ValueError(
            f"{asked} is not possible: these algorithms reach {least:.4g}. Ask for more, or pass "
            "others."
        ) from None
