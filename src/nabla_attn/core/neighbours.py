"""Who is whose neighbour, from geometry alone: along each axis, or by frames."""

from collections.abc import Callable, Iterable
from functools import lru_cache

import torch
from torch import Tensor

from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.order import TokenLayout, block_order
from nabla_attn.shapes import Bool, Int


def axis_neighbours(
    length: int, window: int, stride: int = 1, dilation: int = 1, *, is_causal: bool = False
) -> Bool[Tensor, "length length"]:
    """Who attends whom along one axis in generalised neighbourhood attention (arXiv:2504.16922).

    Each place attends `window` places, itself among them, with `window // 2` before the centre.
    Windows are moved inwards at the borders, and one that is longer than the axis covers it.

    Args:
        length: Places of the axis.
        window: Places that each attends; a causal one ends at the place itself and is cut in front.
        stride: Places side by side that share one window, that of their middle, or their last in a
            causal one; at most the window.
        dilation: Only places that leave the same remainder by it attend each other.
        is_causal: Whether no place attends one behind it.

    Source: SHI-Labs/NATTEN@8c8729f src/natten/backends/flex.py:340-412.
    """
    place = torch.arange(length)
    group, inner = place % dilation, place // dilation
    last = (length - 1 - group) // dilation
    first = inner // stride * stride
    same = group[:, None] == group
    if is_causal:
        leader = torch.minimum(first + stride - 1, last)
        reach = leader[:, None] - inner
        return same & (inner[:, None] >= inner) & (reach < window)
    before, after = window // 2, (window - 1) // 2
    leader = torch.minimum(first + stride // 2, last)
    centre = torch.minimum(leader.clamp_min(before), last - after)
    offset = inner - centre[:, None]
    return same & (offset >= -before) & (offset <= after)


def blocks_along(
    neighbours: Bool[Tensor, "length length"], side: int
) -> Bool[Tensor, "blocks blocks"]:
    """Runs of `side` places of which one attends one of the other's; the last may be shorter."""
    missing = -len(neighbours) % side
    padded = torch.nn.functional.pad(neighbours, (0, missing, 0, missing))
    return padded.unflatten(1, (-1, side)).unflatten(0, (-1, side)).any(dim=3).any(dim=1)


def join_axes(
    grid: TokenGrid,
    along_time: Callable[[int], Bool[Tensor, "blocks blocks"]],
    along_rows: Bool[Tensor, "blocks blocks"],
    along_columns: Bool[Tensor, "blocks blocks"],
) -> Bool[Tensor, "q_blocks kv_blocks"]:
    """Blocks that are neighbours along all three axes.

    Args:
        grid: The token grid.
        along_time: From the frames of a packed clip to the neighbours among its blocks.
        along_rows: Neighbours among rows of blocks.
        along_columns: Neighbours among columns of blocks.
    """
    time = torch.block_diag(*(along_time(frames) for frames in grid.segment_frames)).bool()
    near = time[:, None, None, :, None, None] & along_rows[:, None, None, :, None]
    return (near & along_columns[:, None, None, :]).view(grid.num_blocks, grid.num_blocks)


@lru_cache(maxsize=32)
def places_of_blocks(
    grid: TokenGrid,
) -> tuple[Int[Tensor, "blocks slots"], Int[Tensor, "blocks slots"]]:
    """Frame and place in it (row * width + column) of every slot, -1 where it is empty; on a CPU.

    Frames are counted over all packed clips.
    """
    with torch.inference_mode(False), torch.no_grad():
        order = block_order(TokenLayout(grid), torch.device("cpu"))
        tokens = order.to_blocks.clone()
        tokens[order.empty_slots] = -1
        tokens = tokens.view(grid.num_blocks, -1)
        per_frame = grid.height * grid.width
        frame = torch.div(tokens, per_frame, rounding_mode="floor")
        return frame, torch.where(tokens < 0, -1, tokens % per_frame)


def clip_of_frames(grid: TokenGrid) -> tuple[Int[Tensor, " frames"], Int[Tensor, " frames"]]:
    """The packed clip of every frame, and that clip's first frame."""
    lengths = torch.tensor(grid.segment_frames)
    starts = lengths.cumsum(0) - lengths
    return torch.arange(len(lengths)).repeat_interleave(lengths), starts.repeat_interleave(lengths)


def join_clips(
    maps: Iterable[Bool[Tensor, "frames frames"]],
) -> Bool[Tensor, "frames frames"]:
    """Frames that attend each other, from those of each packed clip."""
    return torch.block_diag(*maps).bool()


def blocks_of_frames(
    grid: TokenGrid, frames: Bool[Tensor, "frames frames"]
) -> Bool[Tensor, "q_blocks kv_blocks"]:
    """Blocks of which one holds tokens of a frame that attends a frame of the other's tokens."""
    frame, _ = places_of_blocks(grid)
    holds = torch.zeros(grid.num_blocks, grid.frames + 1)
    holds.scatter_(1, frame.where(frame >= 0, grid.frames), 1)
    holds = holds[:, :-1]
    return (holds @ frames.float() @ holds.T) > 0
