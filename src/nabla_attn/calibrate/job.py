"""A calibration from prompts to a schedule, with what it is compared with."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nabla_attn.calibrate.budget import (
    Budget,
    TimeBudget,
    Timed,
    choose_by_density,
    choose_by_error,
)
from nabla_attn.calibrate.candidates import CandidateLosses
from nabla_attn.calibrate.run import Calibration, Progress, no_progress
from nabla_attn.calibrate.seconds import SecondsTable
from nabla_attn.calibrate.units import Choice, Units, one_for_all
from nabla_attn.calibrate.weights import (
    Fit,
    Latents,
    fit_of,
    measure_weights,
    predicted_distance,
)
from nabla_attn.schedule import Schedule

RUNS = "latents"
"""The folder of runs of the error model inside a calibration's."""

RANGES = 3
CHECKED = 4  # algorithms for all heads beside the schedule, when the error model is checked


@dataclass(frozen=True)
class Checked:
    """One schedule on held-out prompts.

    Attributes:
        name: What it is.
        predicted: The distance of the final latents that the error model expects.
        measured: Mean distance over the prompts.
    """

    name: str
    predicted: float
    measured: float


@dataclass(frozen=True)
class Result:
    """What a calibration found.

    Attributes:
        schedule: The schedule.
        choice: Its algorithms, and what they keep and lose.
        singles: Each candidate everywhere.
        distance: The distance of the final latents that is expected; None without weights.
        timed: By name, seconds predicted and measured: dense, the schedule, and the one chosen by
            density alone that takes as long. Empty for other budgets.
        checked: Schedules on held-out prompts.
        fit: How well the error model predicts these; None where it was not checked.
    """

    schedule: Schedule
    choice: Choice
    singles: list[Choice]
    distance: float | None = None
    timed: dict[str, Timed] = field(default_factory=dict)
    checked: list[Checked] = field(default_factory=list)
    fit: Fit | None = None


@dataclass(frozen=True)
class CalibrateJob:
    """What to calibrate, and how.

    Attributes:
        calibration: What is measured, and where it is kept.
        prompts: What the measured videos show.
        budget: What the schedule may spend.
        by: Whether "head" or "layer" chooses.
        ranges: Number of ranges of steps that choose on their own; at most the number of steps.
        has_weights: Whether errors are weighted by what they do to the final latents.
        held_out: Prompts that the error model is checked on; needs weights.
        progress: From a label to what is told about the stages of a run.

    Raises:
        ValueError: The error model is to be checked and not measured, or on measured prompts.
    """

    calibration: Calibration
    prompts: Sequence[str]
    budget: Budget
    by: str = "head"
    ranges: int = RANGES
    has_weights: bool = False
    held_out: Sequence[str] = ()
    progress: Progress = no_progress

    def __post_init__(self) -> None:
        if self.held_out and not self.has_weights:
            raise ValueError("--check is about the error model, which --weights measures. Add it.")

    def run(self) -> Result:
        """Measure what is missing, choose, and compare."""
        losses = self.calibration.measure(self.prompts, progress=self.progress)
        steps, layers, heads = losses.density.shape[:3]
        units = Units((steps, layers, heads), min(self.ranges, steps), self.by)
        weights = None
        if self.has_weights:
            runs = Latents(self.calibration, self.calibration.folder / RUNS)
            weights = measure_weights(runs, losses, units, self.prompts, progress=self.progress)
        cost = losses.error if weights is None else weights * losses.noise
        timed: dict[str, Timed] = {}
        if self.budget.is_time:
            timed = self._in_time(losses, units, cost)
            choice = timed["this schedule"].choice
        elif self.budget.density is not None:
            choice = choose_by_density(losses, units, cost, self.budget.density)
        else:
            assert self.budget.error is not None
            choice = choose_by_error(losses, units, self.budget.error)
        result: dict[str, Any] = {"singles": one_for_all(losses), "timed": timed}
        if weights is not None:
            result["distance"] = predicted_distance(losses, weights, choice.picked)
            if self.held_out:
                plain = choose_by_density(losses, units, losses.error, choice.density + 1e-9)
                result |= self._check(
                    losses, weights, {"this schedule": choice, "without weights": plain}
                )
        return Result(self.calibration.schedule(choice.picked), choice, **result)

    def _in_time(self, losses: CandidateLosses, units: Units, cost: np.ndarray) -> dict[str, Timed]:
        calibration, budget = self.calibration, self.budget
        device = getattr(calibration.pipeline, "_execution_device", calibration.pipeline.device)
        table = SecondsTable(calibration.seen(), device)
        tell = self.progress("attention on this machine")
        table.measure(
            calibration.candidates, on_point=lambda done, total: tell("denoise", done, total)
        )
        time = TimeBudget(calibration, losses, units, cost, table, self.prompts[0], self.progress)
        seconds = budget.seconds
        if seconds is None:
            assert budget.speed_up is not None
            seconds = time.dense.predicted / budget.speed_up
        mine = time.choose(seconds)
        other = time.of_density(mine.predicted)
        return {
            "dense": time.dense,
            "this schedule": time.measure(mine, "this schedule"),
            "by density, as many seconds": time.measure(other, "by density"),
        }

    def _check(
        self, losses: CandidateLosses, weights: np.ndarray, choices: dict[str, Choice]
    ) -> dict[str, Any]:
        """The error model on prompts that it was not measured on."""
        candidates = self.calibration.candidates
        singles = [one for one in one_for_all(losses) if one.error > 0]
        singles.sort(key=lambda one: predicted_distance(losses, weights, one.picked))
        places = np.unique(np.linspace(0, len(singles) - 1, CHECKED).round().astype(int))
        for place in places:
            config = candidates[int(singles[place].picked.flat[0])]
            choices = choices | {f"{config} everywhere": singles[place]}
        runs = Latents(self.calibration, self.calibration.folder / RUNS)
        checked = []
        for name, choice in choices.items():
            schedule = self.calibration.schedule(choice.picked)
            found = [
                runs.distance(text, schedule, progress=self.progress) for text in self.held_out
            ]
            predicted = predicted_distance(losses, weights, choice.picked)
            checked.append(Checked(name, predicted, float(np.mean(found))))
        fit = fit_of([one.predicted for one in checked], [one.measured for one in checked])
        return {"checked": checked, "fit": fit}
