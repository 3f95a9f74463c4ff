"""Slow, obvious definitions that the library is held against, and the grids every sweep visits."""

import math

import torch

import nabla_attn as na
from nabla_attn.core.order import TokenLayout, block_order, to_blocks
from nabla_attn.core.window import build_segment_map

# One frame, exact, ragged both ways, one block, less than one block, long and thin.
ODD_GRIDS = {
    "one-frame": na.TokenGrid(1, 16, 24),
    "exact": na.TokenGrid(3, 16, 16),
    "ragged": na.TokenGrid(2, 11, 13),
    "one-block": na.TokenGrid(1, 8, 8),
    "below-a-block": na.TokenGrid(1, 3, 5),
    "clips": na.TokenGrid(4, 9, 8, segments=(3, 1)),
    "cube-blocks": na.TokenGrid(5, 6, 9, block=na.BlockShape(4, 4, 4)),
    "wide-blocks": na.TokenGrid(2, 17, 9, block=na.BlockShape(1, 16, 8)),
    "deep-blocks": na.TokenGrid(3, 8, 12, block=na.BlockShape(2, 8, 8)),
}


def random_qkv(grid, *, batch=1, heads=2, dim=16, num_text=0, dtype=torch.float32, sharpness=2.0):
    """Queries and keys with enough structure that maps are neither full nor single."""
    shape = (batch, heads, grid.num_tokens + num_text, dim)
    q, k, v = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    drift = torch.linspace(0, 3, shape[2], dtype=torch.float64)[:, None]
    phases = torch.arange(dim, dtype=torch.float64)
    field = torch.cos(drift * phases / 3 + phases)
    return (q + sharpness * field).to(dtype), (k + sharpness * field).to(dtype), v.to(dtype)


def token_mask(block_map, layout):
    """[batch, heads, tokens, tokens] of a map, raster order: who attends whom, token by token."""
    if isinstance(layout, na.TokenGrid):
        layout = TokenLayout(layout)
    block = block_map.block_tokens
    slots = to_blocks(torch.arange(1, layout.num_tokens + 1)[None, None, :, None], layout).flatten()
    full = block_map.mask.repeat_interleave(block, -1).repeat_interleave(block, -2)
    if block_map.kv_valid is not None:
        full = full & block_map.kv_valid[:, None, None, :]
    is_token = slots > 0
    kept = full[..., is_token, :][..., is_token]
    back = (slots[is_token] - 1).argsort()
    return kept[..., back, :][..., back]


def masked_attention(q, k, v, mask, scale=None):
    """Dense float64 softmax over the token pairs of `mask`."""
    q, k, v = (x.double() for x in (q, k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v


SMALL_BLOCK = na.BlockShape(1, 4, 4)
# Exact, ragged both ways with blocks of one to sixteen tokens, and two packed clips.
BLOCK_GRIDS = {
    "exact": na.TokenGrid(2, 8, 8, block=SMALL_BLOCK),
    "ragged": na.TokenGrid(2, 9, 7, block=SMALL_BLOCK),
    "clips": na.TokenGrid(3, 5, 8, segments=(2, 1), block=na.BlockShape(2, 4, 4)),
}


class Blocks:
    """Random tokens of a grid in block order, and as one list of tokens for each block."""

    def __init__(self, grid, *, dim=6, dtype=torch.float64, heads=2):
        raster = random_qkv(grid, batch=1, heads=heads, dim=dim, dtype=dtype)
        self.q, self.k, self.v = (to_blocks(x, grid) for x in raster)
        self.counts = block_order(TokenLayout(grid), torch.device("cpu")).counts
        self.scale, self.size = dim**-0.5, grid.block.tokens
        self.allowed = build_segment_map(grid, self.counts.device) if grid.segments else None
        self.lead = self.q.shape[:2]

    def lists(self, x, sample, head):
        parts = x[sample, head].unflatten(0, (-1, self.size))
        return [part[:count] for part, count in zip(parts, self.counts.tolist(), strict=True)]

    def pairs(self, formula, *inputs):
        """[samples, heads, blocks, blocks] of a formula that takes the tokens of two blocks."""
        out = torch.empty(*self.lead, len(self.counts), len(self.counts), dtype=torch.float64)
        for sample in range(self.lead[0]):
            for head in range(self.lead[1]):
                lists = [self.lists(x, sample, head) for x in inputs]
                for i in range(len(self.counts)):
                    for j in range(len(self.counts)):
                        out[sample, head, i, j] = formula(lists[0][i], *(x[j] for x in lists[1:]))
        return out

    def by_rows(self, formula, *inputs):
        """[samples, heads, blocks, blocks] of a formula of a query block and all key blocks."""
        rows = [
            formula(i, *(self.lists(x, sample, head) for x in inputs))
            for sample in range(self.lead[0])
            for head in range(self.lead[1])
            for i in range(len(self.counts))
        ]
        return torch.stack(rows).view(*self.lead, len(self.counts), len(self.counts))

    def sees(self, i, j):
        return self.allowed is None or bool(self.allowed[i, j])
