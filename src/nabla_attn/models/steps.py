"""Which denoising step a forward belongs to, counted from the pipeline and not from calls."""

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

# The highest time of a forward's tokens, then their mean. A long video's next window starts with
# some frames done, so its mean may be below all of the window's before; frames that wait for their
# turn leave the highest as it is.
_Time = tuple[float, float]

# Calls of one step: with and without the prompt. Pipelines with more kinds of guidance make more.
BRANCHES = 2
MAX_BRANCHES = 4

# Pipelines that take the scheduler's last timestep for the end and never run it.
WITHOUT_LAST = frozenset({"LTXI2VLongMultiPromptPipeline"})


class StepCounter:
    """Counts the steps of generations over all transformers of a pipeline.

    While the pipeline's scheduler has an index, that is the truth: classifier-free guidance's
    second call is the same step, and Wan 2.2's two transformers share the count. Before its first
    index, while it rests, and without a pipeline, distinct timesteps are counted. Each window,
    section or chunk of a long video is a generation of its own. The stages of a pyramid, whose
    timesteps go on where those of the stage before ended, are one.

    Args:
        pipeline: A diffusers pipeline; held weakly, and not by copies of the counter.

    Attributes:
        generation: Number of the generation, from 1.
        stage: Number of the stage in a pyramid's generation, from 0.
        turned_after: Steps of the generation before, where timesteps turned back after it; else 0.
        is_foreign: Whether the last forward went on with a generation of another thread.
    """

    def __init__(self, pipeline: Any = None) -> None:
        self._scheduler = _Scheduler(pipeline)
        self._times: _Times | None = None
        self._offset = 0
        self._step = 0
        self._stage_start = 0
        self.generation = 0
        self.stage = 0
        self.turned_after = 0
        self.is_foreign = False
        self._thread = 0

    def __getstate__(self) -> dict[str, Any]:
        # A copied model (EMA) or one in another process no longer belongs to the pipeline.
        return self.__dict__ | {"_scheduler": _Scheduler(None)}

    @property
    def num_steps(self) -> int | None:
        """Steps of the running generation, where a pipeline or its scheduler says so.

        Pyramids say it in their last stage only.
        """
        steps = self.num_stage_steps
        return None if steps is None or self.has_later_stages else self._stage_start + steps

    @property
    def num_stage_steps(self) -> int | None:
        """Steps of the running stage, like `num_steps`; all of them without a pyramid."""
        # Not all pipelines tell the scheduler where they begin; its second index does.
        is_followed = self._times is None
        length, told = self._scheduler.length, self._scheduler.told
        if length is not None:
            length -= self._offset if is_followed else self._scheduler.begin
        if told and length is not None and is_followed:
            # Some tell the steps of all tiles together.
            told = min(told, length)
        count = told or length
        return None if count is None else -(-count // self._scheduler.order)

    @property
    def has_later_stages(self) -> bool:
        """Whether a pyramid's generation goes on after this stage."""
        return self.stage + 1 < self._scheduler.num_stages

    @property
    def is_guided(self) -> bool | None:
        """Whether the pipeline runs classifier-free guidance; None where nothing says so."""
        try:
            return bool(self._scheduler.caller.do_classifier_free_guidance)
        except (AttributeError, TypeError):
            return None

    @property
    def max_branches(self) -> int:
        """Calls that surely belong to one generation while its step is the same."""
        return BRANCHES if self._scheduler.running is None else MAX_BRANCHES

    def observe(self, timestep: Tensor | float | None) -> int:
        """The step of a forward that was given `timestep`.

        Reads the timestep's value, which waits for the device, only where the scheduler does not
        know the step: once per generation with most schedulers.
        """
        generation, thread = self.generation, threading.get_ident()
        index = self._scheduler.index_at(timestep)
        self._step = self._count(_value(timestep)) if index is None else self._follow(index)
        if self.generation != generation:
            self._thread = thread
        self.is_foreign = self._thread != thread
        return self._step

    def _follow(self, index: int) -> int:
        order = self._scheduler.order
        if self._times is not None:
            # Runs that begin inside the schedule (image to video with a strength) are at their
            # second index too when the scheduler first knows it.
            steps = self._step - self._stage_start
            self._offset, self._times = index - 1 - steps * order, None
        step = self._stage_start + (index - self._offset) // order
        self.generation = max(self.generation + (step < self._step), 1)
        return step

    def _count(self, time: _Time) -> int:
        times = self._times
        if self._scheduler.has_next_stage:
            return self._begin_stage(time)
        if times is None or self._scheduler.has_new_timesteps:
            return self._begin(time)
        if times.turn_back_at(time):
            return self._begin(time, turned_after=self._stage_start + times.step + 1)
        if self._scheduler.running is None and times.begin_again_at(time):
            return self._begin(time)
        if self._scheduler.has_moved_on and times.step + 1 == self._scheduler.told:
            return self._begin(time)
        return self._stage_start + times.add(time)

    def _begin(self, time: _Time, turned_after: int = 0) -> int:
        self._times, self.turned_after = _Times(time), turned_after
        self._stage_start = self.stage = 0
        self.generation += 1
        return 0

    def _begin_stage(self, time: _Time) -> int:
        self._times, self._stage_start = _Times(time), self._step + 1
        self.stage += 1
        return self._stage_start


class _Scheduler:
    """Follows a pipeline's scheduler.

    It rests at its end, and where it was left: others call the model, and timesteps move on while
    its index does not.
    """

    def __init__(self, pipeline: Any) -> None:
        self._reference = None if pipeline is None else weakref.ref(pipeline)
        self._index: int | None = None
        self._first: Tensor | float | None = None
        self._calls = 0
        self._left_at: int | None = None
        self._timesteps: Any = None
        self._time: Any = None
        self.has_new_timesteps = False
        self.has_next_stage = False
        self.has_moved_on = False

    @property
    def _pipeline(self) -> Any:
        return self._reference() if self._reference else None

    @property
    def running(self) -> Any:
        """The pipeline; None without one, and while its scheduler rests."""
        pipeline = self._pipeline
        index, timesteps = _ask(pipeline, "step_index"), _ask(pipeline, "timesteps")
        if index is None:
            return pipeline
        is_over = timesteps is not None and index >= len(timesteps)
        return None if is_over or index == self._left_at else pipeline

    @property
    def caller(self) -> Any:
        """The pipeline; None where it says that it does not run: another one shares its scheduler.

        What is left on it is of its own last run.
        """
        pipeline = self.running
        has_time = hasattr(type(pipeline), "current_timestep")
        is_idle = has_time and getattr(pipeline, "current_timestep", None) is None
        return None if is_idle else pipeline

    @property
    def told(self) -> int | None:
        """Number of timesteps of the run, as the caller says it."""
        return getattr(self.caller, "_num_timesteps", None)

    @property
    def timesteps(self) -> Any:
        """Timesteps of the run; None while it rests."""
        return _ask(self.running, "timesteps")

    @property
    def length(self) -> int | None:
        """Number of timesteps; None while it rests, and before it was ever started."""
        if self.timesteps is None or _ask(self.running, "num_inference_steps") is None:
            return None
        if type(self.running).__name__ in WITHOUT_LAST:
            return len(self.timesteps) - 1
        # The last noise level is where the run ends; some schedulers count it as a timestep.
        sigmas = _ask(self.running, "sigmas")
        return len(self.timesteps) if sigmas is None else min(len(self.timesteps), len(sigmas) - 1)

    @property
    def num_stages(self) -> int:
        """Stages of a pyramid (Helios), each with timesteps of its own; 1 without."""
        return getattr(_ask(self.running, "config"), "stages", 1)

    @property
    def begin(self) -> int:
        """Index at which the run begins, as far as the scheduler was told."""
        return _ask(self.running, "begin_index") or 0

    @property
    def order(self) -> int:
        """Indices that make one step (Heun: two); the last step may have fewer."""
        return _ask(self.running, "order", 1)

    def index_at(self, timestep: Tensor | float | None) -> int | None:
        """The index at a forward; None before the first, and while the scheduler rests."""
        # The next run passes the same place.
        if _ask(self._pipeline, "step_index") != self._left_at:
            self._left_at = None
        index = _ask(self.running, "step_index")
        if index != self._index:
            self._index, self._first, self._calls = index, timestep, 0
        self._calls += 1
        if index is not None and self._is_left_by(timestep):
            self._left_at, index = index, None
        before, self._timesteps = self._timesteps, self.timesteps
        self.has_new_timesteps = self._timesteps is not before
        self.has_next_stage = self.has_new_timesteps and self._go_on_from(before)
        # Pipelines take a new object for each step, which both calls of guidance see.
        before, self._time = self._time, getattr(self.caller, "current_timestep", None)
        self.has_moved_on = self._time is not None and self._time is not before
        return index

    def _go_on_from(self, before: Any) -> bool:
        if self.num_stages == 1 or before is None or self._timesteps is None:
            return False
        return bool(self._timesteps[0] <= before[-1])

    def _is_left_by(self, timestep: Tensor | float | None) -> bool:
        # Reading a device waits for it, so it takes more calls there than any guidance makes.
        is_free = not isinstance(timestep, Tensor) or timestep.device.type == "cpu"
        if self._calls <= (BRANCHES if is_free else MAX_BRANCHES):
            return False
        return _value(timestep) != _value(self._first)


class _Times:
    """Counts the distinct timesteps of one generation.

    A timestep against the running direction is a new one, and so is, where no scheduler runs, the
    third call with the only timestep so far.
    """

    def __init__(self, time: _Time) -> None:
        self.step = 0
        self._time, self._direction, self._calls = time, 0, 1

    def turn_back_at(self, time: _Time) -> bool:
        return time != self._time and self._direction == -self._direction_to(time)

    def begin_again_at(self, time: _Time) -> bool:
        # One-step models give every video the same timestep.
        return time == self._time and self.step == 0 and self._calls >= BRANCHES

    def add(self, time: _Time) -> int:
        self._calls += 1
        if time != self._time:
            self._direction, self._time = self._direction_to(time), time
            self.step += 1
        return self.step

    def _direction_to(self, time: _Time) -> int:
        return 1 if time > self._time else -1


def _ask(pipeline: Any, name: str, default: Any = None) -> Any:
    return getattr(getattr(pipeline, "scheduler", None), name, default)


def _value(timestep: Tensor | float | None) -> _Time:
    if isinstance(timestep, Tensor):
        times = timestep.detach().float()
        # One wait for the device.
        top, mean = torch.stack([times.max(), times.mean()]).tolist()
        return top, mean
    return (0.0, 0.0) if timestep is None else (float(timestep), float(timestep))
