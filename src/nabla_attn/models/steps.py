"""Which denoising step a forward belongs to, counted from the pipeline and not from calls."""

import weakref
from typing import Any

from torch import Tensor

# Calls of one step: with and without the prompt. Pipelines with more kinds of guidance make more.
BRANCHES = 2
MAX_BRANCHES = 4


class StepCounter:
    """Counts the steps of generations over all transformers of a pipeline.

    With a pipeline, its scheduler's `step_index` is the truth: classifier-free guidance's second
    call is the same step, Wan 2.2's two transformers share the count, and a new generation starts
    at 0. Schedulers of second order (Heun) take two indices for a step. Before the scheduler's
    first step, distinct timesteps are counted, and new `timesteps` are a new generation.

    Without a pipeline, and while its scheduler rests (at its end, or where others call the model),
    distinct timesteps are counted. A timestep against the running direction is a new generation,
    and so is the third call with the only one so far.

    Args:
        pipeline: a diffusers pipeline; held weakly, and not by copies of the counter.

    Attributes:
        generation: number of the generation, from 1.
        turned_after: steps of the generation before, where timesteps turned back after it; else 0.
    """

    def __init__(self, pipeline: Any = None) -> None:
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self._timesteps: Any = None
        self._time: float | None = None
        self._direction = 0
        self._step = 0
        self._offset: int | None = None
        self._index: int | None = None
        self._stale_index: int | None = None
        self._first: Tensor | float | None = None
        self._calls = 0
        self.generation = 0
        self.turned_after = 0

    def __getstate__(self) -> dict[str, Any]:
        # A copied model (EMA) or one in another process no longer belongs to the pipeline.
        return self.__dict__ | {"_pipeline": None, "_timesteps": None, "_first": None}

    @property
    def _running(self) -> Any:
        """The pipeline; None without one, and while its scheduler rests."""
        pipeline: Any = self._pipeline() if self._pipeline else None
        index = _index_of(pipeline)
        if index is None:
            return pipeline
        timesteps = getattr(pipeline.scheduler, "timesteps", None)
        is_over = timesteps is not None and index >= len(timesteps)
        return None if is_over or index == self._stale_index else pipeline

    @property
    def num_steps(self) -> int | None:
        """Steps of the running generation, where a pipeline says so."""
        pipeline = self._running
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
        return getattr(getattr(self._running, "scheduler", None), "order", 1)

    @property
    def is_guided(self) -> bool | None:
        """Whether the pipeline runs classifier-free guidance; None where nothing says so."""
        try:
            return bool(self._running.do_classifier_free_guidance)
        except (AttributeError, TypeError):
            return None

    @property
    def max_branches(self) -> int:
        """Calls that surely belong to one generation while its step is the same."""
        return BRANCHES if self._running is None else MAX_BRANCHES

    def observe(self, timestep: Tensor | float | None) -> int:
        """The step of a forward that was given `timestep`.

        Reads the timestep's value, which waits for the device, only where the scheduler does not
        know the step: once per generation with most schedulers.
        """
        if self._pipeline and _index_of(self._pipeline()) != self._stale_index:
            self._stale_index = None
        pipeline, timesteps = self._running, self._timesteps
        self._timesteps = getattr(getattr(pipeline, "scheduler", None), "timesteps", None)
        index = _index_of(pipeline)
        if index is not None:
            self._follow(index, timestep)
        elif self._timesteps is not timesteps or self._offset is not None or self._time is None:
            self._start(timestep)
        else:
            self._count(timestep)
        return self._step

    def _follow(self, index: int, timestep: Tensor | float | None) -> None:
        if index != self._index:
            self._index, self._first, self._calls = index, timestep, 0
        self._calls += 1
        if self._has_left(timestep):
            self._stale_index, self._timesteps = index, None
            self._start(timestep)
            return
        calls = self._calls_per_step
        if self._offset is None:
            # Runs that begin inside the schedule (image to video with a strength) are at their
            # second index too when the scheduler first knows it.
            self._offset = index - 1 - self._step * calls if self.generation else 0
            self.generation = max(self.generation, 1)
        step = (index - self._offset) // calls
        self.generation += step < self._step
        self._step = step

    def _has_left(self, timestep: Tensor | float | None) -> bool:
        """Whether timesteps move on while the scheduler does not: an interrupted run's stays."""
        # Reading a device waits for it, so it takes more calls there than any guidance makes.
        is_free = not isinstance(timestep, Tensor) or timestep.device.type == "cpu"
        if self._calls <= (BRANCHES if is_free else MAX_BRANCHES):
            return False
        return _value(timestep) != _value(self._first)

    def _count(self, timestep: Tensor | float | None) -> None:
        time, previous = _value(timestep), self._time
        assert previous is not None
        if time == previous:
            self._calls += 1
            # One-step models give every video the same timestep.
            if self._step == 0 and self._calls > BRANCHES and self._running is None:
                self._start(timestep)
            return
        direction = 1 if time > previous else -1
        if self._direction and direction != self._direction:
            num_steps = self._step + 1
            self._start(timestep)
            self.turned_after = num_steps
        else:
            self._direction, self._step, self._time = direction, self._step + 1, time
            self._calls = 1

    def _start(self, timestep: Tensor | float | None) -> None:
        self._time, self._direction, self._step, self._offset = _value(timestep), 0, 0, None
        self._index, self._calls, self.turned_after = None, 1, 0
        self.generation += 1


def _index_of(pipeline: Any) -> int | None:
    return getattr(getattr(pipeline, "scheduler", None), "step_index", None)


def _value(timestep: Tensor | float | None) -> float:
    if isinstance(timestep, Tensor):
        return float(timestep.detach().float().mean())
    return 0.0 if timestep is None else float(timestep)
