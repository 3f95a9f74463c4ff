"""Which denoising step a forward belongs to, counted from the pipeline and not from calls."""

import weakref
from typing import Any

from torch import Tensor


class StepCounter:
    """Counts the steps of generations over all transformers of a pipeline.

    With a pipeline, its scheduler's `step_index` is the truth: classifier-free guidance's second
    call is the same step, Wan 2.2's two transformers share the count, and a new generation starts
    at 0. Schedulers of second order (Heun) take two indices for a step. Without a pipeline, or
    before the scheduler's first step, distinct timesteps are counted, and a timestep against the
    running direction is a new generation.

    Args:
        pipeline: a diffusers pipeline; held weakly, and not by copies of the counter.
    """

    def __init__(self, pipeline: Any = None) -> None:
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self._time: float | None = None
        self._direction = 0
        self._step = 0
        self._offset: int | None = None
        self.generation = 0

    def __getstate__(self) -> dict[str, Any]:
        # A copied model (EMA) or one in another process no longer belongs to the pipeline.
        return self.__dict__ | {"_pipeline": None}

    @property
    def num_steps(self) -> int | None:
        """Steps of the running generation, where a pipeline says so."""
        pipeline = self._pipeline() if self._pipeline else None
        if pipeline is None:
            return None
        count = getattr(pipeline, "_num_timesteps", None)
        if not count:
            timesteps = getattr(pipeline.scheduler, "timesteps", None)
            if timesteps is None:
                return None
            count = len(timesteps)
        return -(-count // self._calls_per_step)

    @property
    def _calls_per_step(self) -> int:
        """Indices of the scheduler's that make one step; its last step may have fewer."""
        pipeline = self._pipeline() if self._pipeline else None
        return getattr(getattr(pipeline, "scheduler", None), "order", 1)

    @property
    def is_guided(self) -> bool | None:
        """Whether the pipeline runs classifier-free guidance; None where nothing says so."""
        pipeline = self._pipeline() if self._pipeline else None
        try:
            return bool(pipeline.do_classifier_free_guidance)  # type: ignore[union-attr]
        except (AttributeError, TypeError):
            return None

    def observe(self, timestep: Tensor | float | None) -> int:
        """The step of a forward that was given `timestep`.

        Reads the timestep's value, which waits for the device, only where the scheduler does not
        know the step: once per generation with most schedulers.
        """
        index = self._scheduler_index()
        if index is not None:
            self._follow(index)
        elif self._offset is not None or self._time is None:
            self._start(timestep)
        else:
            self._count(timestep)
        return self._step

    def _scheduler_index(self) -> int | None:
        pipeline = self._pipeline() if self._pipeline else None
        return getattr(getattr(pipeline, "scheduler", None), "step_index", None)

    def _follow(self, index: int) -> None:
        calls = self._calls_per_step
        if self._offset is None:
            # Runs that begin inside the schedule (image to video with a strength) are at their
            # second index too when the scheduler first knows it.
            self._offset = index - 1 - self._step * calls if self.generation else 0
            self.generation = max(self.generation, 1)
        step = (index - self._offset) // calls
        self.generation += step < self._step
        self._step = step

    def _count(self, timestep: Tensor | float | None) -> None:
        time, previous = _value(timestep), self._time
        assert previous is not None
        if time == previous:
            return
        direction = 1 if time > previous else -1
        if self._direction and direction != self._direction:
            self._start(timestep)
        else:
            self._direction, self._step, self._time = direction, self._step + 1, time

    def _start(self, timestep: Tensor | float | None) -> None:
        self._time, self._direction, self._step, self._offset = _value(timestep), 0, 0, None
        self.generation += 1


def _value(timestep: Tensor | float | None) -> float:
    if isinstance(timestep, Tensor):
        return float(timestep.detach().float().mean())
    return 0.0 if timestep is None else float(timestep)
