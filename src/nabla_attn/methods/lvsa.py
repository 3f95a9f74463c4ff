"""LVSA: each frame attends the first frames, key frames that move with the steps, and a window."""

from functools import lru_cache
from math import ceil
from types import SimpleNamespace

import torch
from torch import Tensor

from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.neighbours import blocks_of_frames, join_clips
from nabla_attn.methods.contract import State, static
from nabla_attn.methods.parameters import count, word


def choose_interval(frames: int, reference: int, window: int, first: int) -> int:
    """Frames from one key frame to the next, so that each frame attends about `reference`.

    The largest interval that still gives enough frames which all attend; just above the reference,
    where that would be every frame, the larger one of a closed form.
    """
    reference = max(first + 1, reference)
    if frames <= reference:
        return 1
    target = max(first, reference - min(2 * window + 1, frames))
    largest = next(
        (step for step in range(frames, 0, -1) if len(_anchors(frames, first, step, 0)) >= target),
        1,
    )
    spare = 2 * window + first
    closed = ceil(max(frames - spare, reference - spare) / max(reference - spare, 1))
    return max(largest, closed)


def _anchors(frames: int, first: int, interval: int, offset: int) -> set[int]:
    """Frames that all attend."""
    moving = {(offset + start) % frames for start in range(0, frames, interval)}
    return moving | set(range(min(first, frames)))


def _window(at: int, frames: int, window: int, anchors: set[int]) -> range:
    """The window of a frame, widened until anchors cost it no place; none where its side is 0."""
    if window == 0:
        return range(0)
    low = max(0, min(at - window, frames - 1 - 2 * window))
    high = min(frames - 1, max(at + window, 2 * window))
    wanted = min(2 * window + 1, frames - len(anchors))
    others = len(set(range(low, high + 1)) - anchors)
    is_left = True
    while others < wanted:
        if is_left and low > 0:
            low -= 1
            others += low not in anchors
        elif not is_left and high < frames - 1:
            high += 1
            others += high not in anchors
        is_left = not is_left
    return range(low, high + 1)


def frame_map(frames: int, params: SimpleNamespace, step: int) -> Tensor:
    """Which frames of one clip attend which, in a step."""
    interval = params.interval or choose_interval(
        frames, params.reference, params.window, params.first
    )
    offset = step % interval if params.keys == "moving" else 0
    anchors = _anchors(frames, params.first, interval, offset)
    kept = torch.zeros(frames, frames, dtype=torch.bool)
    kept[:, sorted(anchors)] = True
    for at in range(frames):
        kept[at, list(_window(at, frames, params.window, anchors))] = True
    return kept


def _keep(grid: TokenGrid, params: SimpleNamespace, state: State, device: torch.device) -> Tensor:
    return _map(grid, tuple(vars(params).items()), state.step or 0, device)


@lru_cache(maxsize=64)
def _map(
    grid: TokenGrid, params: tuple[tuple[str, int | str], ...], step: int, device: torch.device
) -> Tensor:
    values = SimpleNamespace(**dict(params))
    with torch.inference_mode(False), torch.no_grad():
        frames = join_clips(frame_map(each, values, step) for each in grid.segment_frames)
        return blocks_of_frames(grid, frames).to(device)


METHOD = static(
    _keep,
    name="lvsa",
    title="first frames, moving key frames and a window of frames",
    parameters=(
        count("reference", example=21),
        count("window", least=0, default=3),
        count("first", least=0, default=1),
        count("interval", least=0, default=0),
        word("keys", ("moving", "fixed"), default="moving"),
    ),
    exactness="code",
    ours="blocks of several frames keep what any of them does; no frames are added at the borders "
    "between processes; steps that attend key frames alone are a schedule's (`window` 0)",
    code="JiusiServe/LongVideoSparseAttention@c72a36b lvsa/sparse_attention.py",
    paper="github.com/JiusiServe/LongVideoSparseAttention",
    licence="Apache-2.0",
    published="lvsa-21",
    needs=("step",),
    takes_order=True,
)
