"""Query tiles of several neighbouring blocks: GPUs want taller tiles than the paper's blocks."""

import torch
from torch import Tensor

from nabla_attn.shapes import Bool, Float, Int


def tile_rows(
    mask: Bool[Tensor, "*batch q_blocks kv_blocks"], rows: int
) -> tuple[Bool[Tensor, "*batch tiles kv_blocks"], Bool[Tensor, "*batch tiles kv_blocks"]]:
    """Which key blocks some, and which all, of a tile's `rows` query blocks keep.

    A last tile of fewer blocks counts those alone.
    """
    if rows == 1:
        return mask, mask
    missing = -mask.shape[-2] % rows
    if missing:
        last = mask[..., -1:, :].expand(*mask.shape[:-2], missing, mask.shape[-1])
        mask = torch.cat([mask, last], dim=-2)
    tiles = mask.unflatten(-2, (-1, rows))
    return tiles.any(dim=-2), tiles.all(dim=-2)


def share_pairs_(kept: Bool[Tensor, "heads q_blocks kv_blocks"]) -> None:
    """Give two neighbouring query blocks the union of what they keep, in place."""
    last = kept.shape[1] // 2 * 2
    even, odd = kept[:, 0:last:2], kept[:, 1:last:2]
    even |= odd
    odd |= even


def mean_of_pairs(
    pooled: Float[Tensor, "heads q_blocks dim"],
    counts: Int[Tensor, " q_blocks"],
    segments: Bool[Tensor, "q_blocks q_blocks"] | None = None,
) -> Float[Tensor, "heads q_blocks dim"]:
    """Pool two neighbouring query blocks into one mean over their tokens; both rows get it.

    A pair stands side by side in a frame: with blocks of 8x8, 8x16 tokens.

    Args:
        pooled: Means of the blocks.
        counts: Their tokens.
        segments: Which blocks are of one packed clip; others stay as they are.
    """
    last = pooled.shape[1] // 2 * 2
    weights = counts[:last].to(pooled.dtype)[:, None]
    pairs = (pooled[:, :last] * weights).unflatten(1, (-1, 2)).sum(dim=2)
    means = pairs / weights.unflatten(0, (-1, 2)).sum(dim=1)
    means = means.repeat_interleave(2, dim=1)
    if segments is not None:
        is_pair = segments.diagonal(1)[::2].repeat_interleave(2)[:, None]
        means = torch.where(is_pair, means, pooled[:, :last])
    return torch.cat([means, pooled[:, last:]], dim=1)
