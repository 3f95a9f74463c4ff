"""The plain definition of a map: pool, score, sort, cumulate, compare. The fast path equals it."""

from math import ceil

import torch
from torch import Tensor

from nabla_attn.config import SparseConfig
from nabla_attn.core.order import TokenLayout, block_order, to_blocks
from nabla_attn.shapes import Bool, Float


def reference_map(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch heads tokens dim"],
    layout: TokenLayout,
    config: SparseConfig,
    *,
    scale: float | None = None,
) -> Bool[Tensor, "batch heads q_blocks kv_blocks"]:
    """Which video blocks each video block keeps, in the dtype of q and k; memory is not bounded.

    Args:
        q: Queries in raster order.
        k: Keys in raster order.
        layout: Where the tokens are.
        config: Which blocks are kept.
        scale: Factor on q.k; None is 1/sqrt(dim).

    Source: arXiv:2507.13546 Alg. 1; reference wan/modules/attention.py:243-276.
    """
    clip, *positions = _positions(layout)
    same_clip = clip[:, None] == clip[None, :]
    pooled_q, pooled_k = (_pool(x, layout) for x in (q, k))
    if config.pair_queries == "pool":
        pooled_q = _pool_pairs(pooled_q, layout, clip)
    scores = pooled_q @ pooled_k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    probs = scores.masked_fill(~same_clip, float("-inf")).softmax(dim=-1)
    kept = torch.full_like(probs, config.is_dense, dtype=torch.bool)
    if config.threshold is not None:
        kept = kept | keep_by_mass(probs, config.threshold)
    if config.topk is not None:
        kept = kept | keep_top(probs, config.topk, same_clip.sum(dim=-1, keepdim=True))
    if config.window is not None:
        gaps = [(at[:, None] - at[None, :]).abs() for at in positions]
        near = [gap <= side // 2 for gap, side in zip(gaps, config.window, strict=True)]
        kept = kept | torch.stack(near).all(dim=0)
    if config.keep_first_frame:
        first = [positions[0][clip == each].min() for each in clip.unique()]
        kept = kept | torch.isin(positions[0], torch.stack(first))
    kept = kept & same_clip
    return _share_pairs(kept) & same_clip if config.pair_queries else kept


def keep_by_mass(
    probs: Float[Tensor, "*rows kv_blocks"], threshold: float
) -> Bool[Tensor, "*rows kv_blocks"]:
    """The fewest highest blocks of each row whose mass reaches the threshold; 1 keeps all."""
    ordered, index = probs.sort(dim=-1, descending=True, stable=True)
    # The block that crosses the threshold is kept: what stands before it weighs less.
    before = ordered.cumsum(dim=-1) - ordered
    keep = (before < threshold) | (threshold >= 1)
    return torch.zeros_like(keep).scatter_(-1, index, keep)


def keep_top(
    probs: Float[Tensor, "*rows kv_blocks"], share: float, counts: Tensor
) -> Bool[Tensor, "*rows kv_blocks"]:
    """The highest `share` of each row's blocks, of which there are `counts`, rounded up."""
    index = probs.argsort(dim=-1, descending=True, stable=True)
    # 0.1 * 30 is 3.0000000000000004 in binary: shave rounding off before going up.
    wanted = torch.tensor([ceil(share * n * (1 - 1e-12)) for n in counts.flatten().tolist()])
    keep = torch.arange(probs.shape[-1]) < wanted.clamp_min(1).view(counts.shape)
    return torch.zeros_like(probs, dtype=torch.bool).scatter_(-1, index, keep.expand(index.shape))


def _pool(x: Tensor, layout: TokenLayout) -> Tensor:
    """The mean of every video block over the tokens that it has."""
    blocks, slots = layout.grid.num_blocks, layout.grid.block.tokens
    counts = block_order(layout, x.device).counts[:blocks].to(x.dtype)
    sums = to_blocks(x, layout)[:, :, : blocks * slots].unflatten(2, (blocks, slots)).sum(dim=3)
    return sums / counts[:, None]


def _positions(layout: TokenLayout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clip, and position along time, height and width, of every video block."""
    axes = torch.meshgrid(*map(torch.arange, layout.grid.blocks), indexing="ij")
    time, row, column = (axis.flatten() for axis in axes)
    ends = torch.tensor(layout.grid.segment_blocks).cumsum(0)
    return torch.bucketize(time.contiguous(), ends, right=True), time, row, column


def _pool_pairs(pooled: Tensor, layout: TokenLayout, clip: Tensor) -> Tensor:
    counts = block_order(layout, pooled.device).counts.to(pooled.dtype)
    pairs = pooled.clone()
    for first in range(0, pooled.shape[2] - 1, 2):
        if clip[first] == clip[first + 1]:
            both, weights = pooled[:, :, first : first + 2], counts[first : first + 2, None]
            pairs[:, :, first : first + 2] = (both * weights).sum(2, True) / weights.sum()
    return pairs


def _share_pairs(kept: Tensor) -> Tensor:
    shared = kept.clone()
    for first in range(0, kept.shape[2] - 1, 2):
        shared[:, :, first : first + 2] = kept[:, :, first : first + 2].any(dim=2, keepdim=True)
    return shared
