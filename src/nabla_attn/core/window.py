"""Which blocks see each other, from geometry alone: sliding tiles and packed clips."""

from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.order import TokenLayout, block_order
from nabla_attn.shapes import Bool, Int


@lru_cache(maxsize=32)
def build_window_map(
    grid: TokenGrid, window: tuple[int, int, int], device: torch.device
) -> Bool[Tensor, "q_blocks kv_blocks"]:
    """Blocks within half a window of each other, cached per grid.

    Args:
        grid: The token grid.
        window: Sides along (frames, height, width) in blocks. |delta| <= side // 2, clipped at
            the borders, so an even side acts as the next odd one.
        device: Where the map lives.

    Raises:
        ValueError: The grid has an order of tokens, whose blocks have no place.

    Source: reference wan/modules/attention.py:243-254.
    """
    if grid.order is not None:
        raise ValueError(
            f"a window needs blocks that have a place in the video: got tokens in the order "
            f"{grid.order}. Leave out the window or the order."
        )
    with torch.inference_mode(False), torch.no_grad():
        near = torch.ones((), dtype=torch.bool, device=device)
        for position, side in zip(_block_positions(grid, device), window, strict=True):
            near = near & ((position[:, None] - position[None, :]).abs() <= side // 2)
        return near if grid.segments is None else near & build_segment_map(grid, device)


@lru_cache(maxsize=32)
def build_segment_map(grid: TokenGrid, device: torch.device) -> Bool[Tensor, "q_blocks kv_blocks"]:
    """Blocks of the same packed clip, cached (reference: wan/modules/attention.py:266-269)."""
    with torch.inference_mode(False), torch.no_grad():
        clips = torch.arange(len(grid.segment_blocks), device=device)
        lengths = torch.tensor(grid.segment_blocks, device=device)
        _, rows, columns = grid.blocks
        clip = clips.repeat_interleave(lengths).repeat_interleave(rows * columns)
        return clip[:, None] == clip[None, :]


def _block_positions(grid: TokenGrid, device: torch.device) -> tuple[Int[Tensor, " blocks"], ...]:
    """Block coordinates (time, row, column) of every block, in block order."""
    axes = [torch.arange(count, device=device) for count in grid.blocks]
    return tuple(axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij"))


@lru_cache(maxsize=32)
def build_first_frame_map(grid: TokenGrid, device: torch.device) -> Bool[Tensor, " kv_blocks"]:
    """Blocks that hold tokens of a clip's first frame, cached: the sink some models lean on."""
    first, start = [], 0
    for frames in grid.segment_frames:
        first.append(start)
        start += frames
    with torch.inference_mode(False), torch.no_grad():
        slots = block_order(TokenLayout(grid), device).to_raster.view(grid.frames, -1)
        found = torch.zeros(grid.num_blocks, dtype=torch.bool, device=device)
        found[slots[first].flatten() // grid.block.tokens] = True
        return found


@lru_cache(maxsize=32)
def build_neighbour_map(
    grid: TokenGrid, device: torch.device
) -> Bool[Tensor, "q_blocks kv_blocks"]:
    """Blocks that touch, corners included, or are the same, cached; in any order of tokens.

    Source: Jenga, dvlab-research/Jenga@6905150 gilbert.py gilbert_block_neighbor_mapping.
    """
    with torch.inference_mode(False), torch.no_grad():
        blocks = block_order(TokenLayout(grid), device).to_raster // grid.block.tokens
        clips = blocks.view(grid.frames, grid.height, grid.width).split(grid.segment_frames)
        found = torch.eye(grid.num_blocks, dtype=torch.bool, device=device)
        for clip in clips:
            for shift in product((-1, 0, 1), repeat=3):
                moves = list(zip(shift, clip.shape, strict=True))
                at = tuple(slice(max(0, by), size + min(0, by)) for by, size in moves)
                to = tuple(slice(max(0, -by), size + min(0, -by)) for by, size in moves)
                found[clip[at], clip[to]] = True
        return found
