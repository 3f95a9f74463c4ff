"""One video from one request: apply the algorithm, sample, measure, restore."""

import hashlib
import itertools
import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np

from nabla_attn.config import parse
from nabla_attn.core.grid import TokenGrid
from nabla_attn.distributed import num_processes
from nabla_attn.fusion import fusing_for
from nabla_attn.generation.call import StageClock, sample
from nabla_attn.generation.memory import check_memory
from nabla_attn.generation.pipeline import model_identity
from nabla_attn.generation.request import GenerationRequest, check_request, video_tokens
from nabla_attn.generation.text import warn_of_unknown_words, watch_texts
from nabla_attn.progress import ProgressCallback, ignore_progress
from nabla_attn.record import RunRecord, collect_versions, describe_device
from nabla_attn.schedule import Schedule


def generate(
    pipeline: Any,
    request: GenerationRequest,
    *,
    on_progress: ProgressCallback = ignore_progress,
    inputs: dict[str, Any] | None = None,
    on_apply: Callable[[Any], None] | None = None,
) -> tuple[np.ndarray, RunRecord]:
    """Make one video. The same request on the same machine gives the same bytes.

    Args:
        pipeline: A pipeline of `load_pipeline`, or any other of diffusers for a supported model.
        request: The video to make.
        on_progress: Called at every stage and step.
        inputs: Further arguments of the pipeline's call, such as `image` or `generator`.
        on_apply: Called with the handle of the sparse attention before sampling, to observe it.

    Returns:
        The frames, uint8 [frames, height, width, 3], and the record of the run.

    Raises:
        ValueError: The model cannot take the request, the machine has too little memory for it, or
            its numbers overflowed.
    """
    check_request(pipeline, request)
    if num_processes() == 1:  # several share the tokens
        check_memory(pipeline, request)
    for name in ("prompt", "negative_prompt"):
        warn_of_unknown_words(pipeline, name.replace("_", " "), getattr(request, name))
    # With offloading the pipeline rests on the CPU and works elsewhere.
    device = getattr(pipeline, "_execution_device", pipeline.device)
    clock = StageClock(device, request.steps, on_progress)
    with (
        _attending(pipeline, request) as handle,
        watch_texts(pipeline, request) as cut,
        clock.watch(pipeline),
    ):
        if handle is not None:
            _warn_of_rules(pipeline, request, handle)
        if on_apply is not None and handle is not None:
            on_apply(handle)
        with fusing_for(_num_pairs(pipeline, request, handle)):
            video = sample(pipeline, request, on_step_end=clock.on_step_end, **(inputs or {}))
        seconds = clock.seconds()
        attention = _attention_numbers(handle)
    frames = _to_uint8(video[0])
    grid = dict(zip(("frames", "height", "width"), video_tokens(pipeline, request), strict=True))
    config = request.to_dict() | model_identity(pipeline) | _made(frames, request)
    numbers = {
        "seconds": seconds,
        "attention": attention,
        "tokens": grid,
        "frames_sha256": hashlib.sha256(frames.tobytes()).hexdigest(),
    }
    if cut:
        numbers["cut"] = cut
    record = RunRecord(
        kind="generate",
        config=config,
        seed=request.seed,
        versions=collect_versions(),
        device=describe_device(device),
        numbers=numbers,
    )
    return frames, record


def _made(frames: np.ndarray, request: GenerationRequest) -> dict[str, int]:
    """The size of the video as the pipeline made it, with a warning where it is another."""
    asked = {name: getattr(request, name) for name in ("frames", "height", "width")}
    made = dict(zip(asked, frames.shape, strict=False))
    if made != asked:
        sizes = ("{width}x{height} and {frames} frames".format(**size) for size in (made, asked))
        warnings.warn("the pipeline made {} where {} were asked for.".format(*sizes), stacklevel=3)
    return made


def warm_up(pipeline: Any, request: GenerationRequest) -> None:
    """One untimed step with the request's algorithm, so that what it compiles is compiled."""
    config = parse(request.sparse_algo)
    # Without dense first steps, or the one step would not touch the algorithm.
    schedule = None if config.is_dense else Schedule(algorithm=config)
    # Mochi's times need two steps; the second is not run.
    short = replace(request, steps=2, schedule=schedule)
    with (
        _attending(pipeline, short) as handle,
        fusing_for(_num_pairs(pipeline, request, handle)),
    ):
        sample(pipeline, short, on_step_end=_stop, output_type="latent")


def _num_pairs(pipeline: Any, request: GenerationRequest, handle: Any) -> int:
    """Pairs of blocks that a generation scores, about, were all of its steps sparse."""
    if handle is None:
        return 0
    grid = TokenGrid(*video_tokens(pipeline, request))
    blocks = grid.with_block(handle.schedule.algorithm.block).num_blocks
    passes = 2 if request.guidance > 1 else 1
    return blocks**2 * handle.num_heads * handle.num_layers * request.steps * passes


def _stop(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    pipeline._interrupt = True
    return tensors


def _attending(pipeline: Any, request: GenerationRequest) -> AbstractContextManager[Any]:
    """The request's attention for the time of a block: its handle, or None where all is dense.

    A pipeline that was loaded with an algorithm of its own has it back at the end.
    """
    from nabla_attn.models import replaced

    if request.is_dense:
        return replaced(pipeline, None)
    return replaced(pipeline, request.sparse_algo, schedule=request.schedule)


def _to_uint8(video: np.ndarray) -> np.ndarray:
    """Floats in [0, 1] to uint8 frames."""
    if not np.isfinite(video).all():
        raise ValueError("the model's numbers overflowed. Use --dtype bfloat16 or float32.")
    return np.rint(video * 255).astype(np.uint8)


def _attention_numbers(handle: Any) -> dict[str, Any]:
    """Density and kept mass: the means, and [steps][layers] where the algorithm was applied."""
    if handle is None:
        return {"density": 1.0, "kept_mass": 1.0}
    return handle.report().to_dict()


def _warn_of_rules(pipeline: Any, request: GenerationRequest, handle: Any) -> None:
    """Warn of rules of a schedule that no step reaches, and that leave nothing sparse."""
    schedule: Schedule = handle.schedule
    named = {*schedule.step_overrides, *(n for rule in schedule.rules for n in rule.steps or ())}
    if unused := sorted(step for step in named if step >= request.steps):
        warnings.warn(
            f"the schedule's rules for steps {', '.join(map(str, unused))} are unused: the run "
            f"has the steps 0 to {request.steps - 1}.",
            stacklevel=3,
        )
    if reason := _why_all_dense(pipeline, request, handle):
        warnings.warn(
            f"{request.sparse_algo} changes nothing here: its schedule keeps {reason}, or pass "
            "another schedule.",
            stacklevel=3,
        )


def _why_all_dense(pipeline: Any, request: GenerationRequest, handle: Any) -> str:
    """What a schedule without any sparse call keeps dense, and the remedy; "" for others."""
    schedule: Schedule = handle.schedule
    dense_steps = schedule.dense_first_steps + schedule.dense_last_steps
    if dense_steps >= request.steps:
        return f"{dense_steps} steps dense, and there are {request.steps}. Ask for more steps"
    tokens = math.prod(video_tokens(pipeline, request))
    if tokens < schedule.min_tokens:
        least = schedule.min_tokens
        return f"videos below {least} tokens dense, and this has {tokens}. Ask for a larger one"
    counts = {"num_steps": request.steps, "num_layers": handle.num_layers, "num_tokens": tokens}
    calls = itertools.product(range(request.steps), range(handle.num_layers), [handle.num_heads])
    groups = itertools.chain(*(schedule.groups_for(*call, **counts) for call in calls))
    if all(group.config.is_dense for group in groups):
        return "every step and layer dense. Leave some of them to the algorithm"
    return ""
