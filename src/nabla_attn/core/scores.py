"""How much each query block wants each key block: masked mean pooling, product, softmax."""

from dataclasses import astuple
from math import sqrt

import torch
from torch import Tensor

from nabla_attn.core.grid import TokenGrid
from nabla_attn.shapes import Bool, Float

RASTER_AXES = (0, 1, 3, 5)
"""Axes of what `split_raster` gives that count heads and blocks, not tokens of a block."""


# The two ways to pool are compiled for all sizes at once, which checks of shapes would forbid.
def pool_blocks(x: Tensor, counts: Tensor) -> Tensor:
    """Mean of the tokens of each block, in fp32 whatever the input (fp64 stays fp64).

    Args:
        x: Queries or keys in block order [..., slots, dim], empty slots zero (see
            `order.to_blocks`).
        counts: Tokens of each block [blocks]; empty slots are not counted.

    Returns:
        [..., blocks, dim].

    Source: arXiv:2507.13546 Alg. 1 lines 1-4; reference wan/modules/attention.py:262-263.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    sums = x.unflatten(-2, (counts.numel(), -1)).sum(dim=-2, dtype=dtype)
    return sums / counts.to(dtype)[:, None]


def pool_raster(x: Tensor) -> Tensor:
    """`pool_blocks` of tokens in raster order that fill their blocks: read once, not reordered.

    Args:
        x: Queries or keys as `split_raster` sees them, [..., times, frames, rows, height, columns,
            width, dim].

    Returns:
        [..., blocks, dim].
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.to(dtype).mean(dim=(-6, -4, -2)).flatten(-4, -2)


def take_and_pool(
    x: Tensor, slots: Tensor, is_filled: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens in blocks, and their `pool_blocks`, in one pass over both where this is compiled.

    Args:
        x: Queries or keys [batch, tokens, heads, dim].
        slots: The token of every slot [blocks, block tokens].
        is_filled: Which slots hold a token [blocks, block tokens].
        counts: Tokens of each block [blocks].

    Returns:
        [batch, blocks, block tokens, heads, dim], zero in empty slots, and [batch, blocks, heads,
        dim].
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    blocks = torch.where(is_filled[:, :, None, None], x[:, slots], x.new_zeros(()))
    return blocks, blocks.sum(dim=2, dtype=dtype) / counts.to(dtype)[:, None, None]


def split_raster(x: Float[Tensor, "*batch heads tokens dim"], grid: TokenGrid) -> Tensor:
    """A view with the axes of blocks and of their tokens apart; no edge may be ragged."""
    sides = zip(grid.blocks, astuple(grid.block), strict=True)
    return x.unflatten(-2, [size for side in sides for size in side])


def multiply_blocks(
    q_pooled: Float[Tensor, "*batch q_blocks dim"],
    k_pooled: Float[Tensor, "*batch kv_blocks dim"],
    *,
    scale: float | None = None,
    allowed: Bool[Tensor, "q_blocks kv_blocks"] | None = None,
) -> Float[Tensor, "*batch q_blocks kv_blocks"]:
    """The scaled product of pooled tokens, whatever autocast says.

    Args:
        q_pooled: Pooled queries, fp32 or fp64.
        k_pooled: Pooled keys, same dtype.
        scale: Factor on the product; None is 1/sqrt(dim).
        allowed: Pairs outside it become minus infinity (packed clips).
    """
    scale = 1 / sqrt(q_pooled.shape[-1]) if scale is None else scale
    # The map is data: autocast must not round it, and a different map is a different result.
    with torch.autocast(q_pooled.device.type, enabled=False):
        scores = (q_pooled * scale) @ k_pooled.transpose(-1, -2)
    return scores if allowed is None else scores.masked_fill(~allowed, float("-inf"))


def score_blocks(
    q_pooled: Float[Tensor, "*batch q_blocks dim"],
    k_pooled: Float[Tensor, "*batch kv_blocks dim"],
    *,
    scale: float | None = None,
    allowed: Bool[Tensor, "q_blocks kv_blocks"] | None = None,
) -> Float[Tensor, "*batch q_blocks kv_blocks"]:
    """Probabilities of key blocks per query block: softmax of the scaled product of pooled tokens.

    Arguments as for `multiply_blocks`; pairs that are not allowed get probability 0.

    Source: arXiv:2507.13546 Alg. 1 line 6; reference wan/modules/attention.py:264-270.
    """
    return multiply_blocks(q_pooled, k_pooled, scale=scale, allowed=allowed).softmax(dim=-1)
