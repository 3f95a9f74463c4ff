"""Call a pipeline with a request, whichever way it takes guidance and tells of its steps.

The wall seconds of its stages are read from hooks on its own modules.
"""

import inspect
import re
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from inspect import Parameter
from typing import Any

import torch

from nabla_attn.generation.request import GenerationRequest, guider_scale
from nabla_attn.generation.text import warn_of_unread
from nabla_attn.progress import ProgressCallback, ignore_progress
from nabla_attn.sizes import denoisers

StepEnd = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]
"""diffusers' `callback_on_step_end`: pipeline, step, timestep and tensors to tensors."""

FRAMES = {"image": "--image", "last_image": "--last-image"}
"""Arguments of pipelines for given frames, with the options of `nabla generate`."""


def sample(
    pipeline: Any, request: GenerationRequest, *, on_step_end: StepEnd | None = None, **options: Any
) -> Any:
    """The request's frames, as the pipeline gives them.

    Args:
        pipeline: A diffusers pipeline of videos.
        request: The video to make; attention is left as it is.
        on_step_end: Called after every step.
        options: Further arguments of the pipeline's call, or others than the request's.

    Raises:
        ValueError: The pipeline does not take one of the arguments, or needs another.
    """
    pipeline.set_progress_bar_config(disable=True)
    known = inspect.signature(pipeline.__call__).parameters
    call = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "height": request.height,
        "width": request.width,
        "num_frames": request.frames,
        "num_inference_steps": request.steps,
        # On the CPU whatever the device: the same seed starts from the same noise everywhere.
        "generator": torch.Generator("cpu").manual_seed(request.seed),
        "output_type": "np",
    }
    with ExitStack() as stack:
        if "guidance_scale" not in known and getattr(pipeline, "guider", None) is not None:
            stack.enter_context(_guided(pipeline, request.guidance))
        else:
            call["guidance_scale"] = request.guidance
        if request.guidance_2 is not None:
            call["guidance_scale_2"] = request.guidance_2
        if "callback_on_step_end" in known:
            call["callback_on_step_end"] = on_step_end
        elif on_step_end is not None:
            stack.enter_context(_watched(pipeline, on_step_end))
        call |= options
        check_frames(pipeline, call)
        _check_call(pipeline, call, known)
        warn_of_unread(pipeline, call)
        stack.enter_context(_seeded(request.seed))
        made = pipeline(**call)
    if getattr(made, "audio", None) is not None:
        warnings.warn(
            f"{type(pipeline).__name__} makes sound too, which is not kept here. For a video with "
            "sound, use nabla_attn.apply(pipeline, ...) and call it in your own code.",
            stacklevel=2,
        )
    return made.frames


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Global random numbers that follow from the seed, for the time of a block.

    Stochastic schedulers draw noise in every step, and not all are given the request's generator.
    """
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


@contextmanager
def _guided(pipeline: Any, scale: float) -> Iterator[None]:
    """The pipeline's guider with another scale, its other settings kept, for the time of a block.

    HunyuanVideo 1.5 and Motif-Video have such an object instead of an argument.
    """
    guider = pipeline.guider
    own = guider_scale(guider.config)
    if own is None:
        raise ValueError(
            f"{type(guider).__name__} has no guidance_scale, so the guidance of a request cannot "
            "be set on it. Give the pipeline a ClassifierFreeGuidance as its guider."
        )
    if scale != own:
        pipeline.guider = guider.new(guidance_scale=scale, enabled=scale > 1)
    try:
        yield
    finally:
        pipeline.guider = guider


@contextmanager
def _watched(pipeline: Any, on_step_end: StepEnd) -> Iterator[None]:
    """Call back after each of the scheduler's steps, for pipelines without a callback."""
    scheduler, done = pipeline.scheduler, 0
    step = scheduler.step

    def counted(output: Any, timestep: Any, *others: Any, **options: Any) -> Any:
        nonlocal done
        stepped = step(output, timestep, *others, **options)
        on_step_end(pipeline, done, timestep, {})
        done += 1
        return stepped

    scheduler.step = counted
    try:
        yield
    finally:
        del scheduler.step


def check_frames(pipeline: Any, given: Collection[str]) -> None:
    """Refuse given frames that a pipeline does not read, and ask for those that it needs.

    Args:
        pipeline: The pipeline; its parts need no data.
        given: Names of arguments of its call that are given.

    Raises:
        ValueError: A first or last frame is given that the model does not read, or one is missing.
    """
    name = type(pipeline).__name__
    known = inspect.signature(pipeline.__call__).parameters
    for argument, option in FRAMES.items():
        if argument in given and argument not in known:
            raise ValueError(
                f"{name} takes no {argument}: it makes videos without that frame. Drop {option}, "
                "or pass --model with one that reads it."
            )
    if "image" not in known:
        return
    makes_from_image = re.search("I(mage)?(To|2)V(ideo)?", name) is not None
    if "image" not in given and (_is_needed(known["image"]) or makes_from_image):
        raise ValueError(
            f"{name} makes videos from a first frame, and got none. Add --image FIRST_FRAME.png to "
            '`nabla generate`, or inputs={"image": image} to `generate`.'
        )
    _check_last_frame(pipeline, has_last="last_image" in given)


def _check_last_frame(pipeline: Any, *, has_last: bool) -> None:
    """Hold a last frame against what the model was made for; diffusers ignores it or breaks."""
    config = denoisers(pipeline)[0].config
    if has_last and pipeline.config.get("expand_timesteps"):
        raise ValueError(
            f"this {type(pipeline).__name__} reads a first frame only. Drop --last-image."
        )
    if config.get("image_dim") is None:
        return
    needs_last = config.get("pos_embed_seq_len") is not None
    if needs_last and not has_last:
        raise ValueError(
            "this model makes videos between a first and a last frame, and got the first only. Add "
            '--last-image LAST_FRAME.png to `nabla generate`, or "last_image" to the inputs of '
            "`generate`."
        )
    if has_last and not needs_last:
        raise ValueError(
            "this model was trained for a first frame only. Drop --last-image, or pass --model "
            "with one for first and last frames."
        )


def _check_call(pipeline: Any, call: Mapping[str, Any], known: Mapping[str, Parameter]) -> None:
    name = type(pipeline).__name__
    remedy = "Use nabla_attn.apply(pipeline, ...) and call it in your own code."
    if unknown := call.keys() - known.keys():
        raise ValueError(
            f"{name} takes no {', '.join(sorted(unknown))}, so it cannot be run from here. {remedy}"
        )
    missing = [key for key, value in known.items() if _is_needed(value) and key not in call]
    if missing:
        raise ValueError(
            f"{name} needs {', '.join(missing)}, which cannot be asked for here. {remedy}"
        )


def _is_needed(parameter: Parameter) -> bool:
    is_rest = parameter.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    return parameter.default is Parameter.empty and not is_rest


class StageClock:
    """Times text, transformer per step, and decode of one pipeline call.

    Text is everything before the first transformer call, decode everything after the last step; in
    between only the transformer's own calls count.

    Args:
        device: The device on which the pipeline runs; a GPU is waited for at each reading.
        num_steps: Number of denoising steps of the call.
        on_progress: Called at every stage and step.
        clock: The clock.
    """

    def __init__(
        self,
        device: torch.device,
        num_steps: int,
        on_progress: ProgressCallback = ignore_progress,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._clock = clock
        self._device = device
        self._num_steps = num_steps
        self._on_progress = on_progress
        self._begin = self._call_start = self._last_step = 0.0
        self._step_seconds = 0.0
        self._text: float | None = None
        self.transformer_steps: list[float] = []

    @contextmanager
    def watch(self, pipeline: Any) -> Iterator["StageClock"]:
        """Hook the pipeline's transformers for the time of the block."""
        hooks = []
        for module in denoisers(pipeline):
            hooks.append(module.register_forward_pre_hook(self._before_call))
            hooks.append(module.register_forward_hook(self._after_call))
        self._begin = self._read()
        self._on_progress("text", 0, 1)
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def on_step_end(self, pipeline: Any, step: int, timestep: Any, tensors: dict) -> dict:
        """diffusers' `callback_on_step_end`."""
        self.transformer_steps.append(self._step_seconds)
        self._step_seconds = 0.0
        self._last_step = self._read()
        self._on_progress("denoise", step + 1, self._num_steps)
        if step + 1 == self._num_steps:
            self._on_progress("decode", 0, 1)
        return tensors

    def seconds(self) -> dict[str, Any]:
        """Seconds by stage; call it once the pipeline has returned."""
        end = self._read()
        self._on_progress("done", 1, 1)
        return {
            "text": round(self._text or 0.0, 4),
            "transformer": round(sum(self.transformer_steps), 4),
            "transformer_steps": [round(step, 4) for step in self.transformer_steps],
            "decode": round(end - self._last_step, 4),
            "total": round(end - self._begin, 4),
        }

    def _before_call(self, module: Any, inputs: Any) -> None:
        self._call_start = self._read()
        if self._text is None:
            self._text = self._call_start - self._begin
            self._on_progress("denoise", 0, self._num_steps)

    def _after_call(self, module: Any, inputs: Any, output: Any) -> None:
        self._step_seconds += self._read() - self._call_start

    def _read(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._clock()
