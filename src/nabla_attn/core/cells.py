"""Estimates from cells: blocks cut into runs of some tokens that lie side by side in block order.

Arguments and bounds as in `core.estimates`. Cells without tokens do not count.
"""

from math import sqrt

import torch
from torch import Tensor

from nabla_attn.core.estimates import fill_scores, filled_slots, of_heads, pool_panels
from nabla_attn.shapes import Bool, Float, Int


def score_cells(
    q: Float[Tensor, "*heads slots dim"],
    k: Float[Tensor, "*heads slots dim"],
    counts: Int[Tensor, " blocks"],
    *,
    cell_tokens: int = 16,
    scale: float | None = None,
) -> Float[Tensor, "*heads blocks blocks"]:
    """The log-sum-exp of scores between the means of the cells that blocks are cut into.

    Cells of one token give the logarithm of a block pair's exact mass before it is normalised,
    cells of a whole block the scaled product of means. Cells without tokens do not count.

    Args:
        q: Queries.
        k: Keys.
        counts: Tokens of every block.
        cell_tokens: Slots of a cell, which lie side by side in block order; must divide a block's.
        scale: Factor on q.k; None is 1/sqrt(dim).

    Raises:
        ValueError: The cells do not divide the blocks.

    Source: SubBlock, sgl-project/sglang subblock_sparse/router.py.
    """
    cells, per_block = _cells_of(q, counts, cell_tokens)
    q_pooled, k_pooled = (of_heads(_pool_cells(x, cells)) for x in (q, k))
    is_empty, num_blocks = cells == 0, counts.numel()
    scale = 1 / sqrt(q.shape[-1]) if scale is None else scale

    def score(head: slice, rows: slice) -> Tensor:
        some = slice(rows.start * per_block, rows.stop * per_block)
        scores = (q_pooled[head, some] * scale) @ k_pooled[head].transpose(-1, -2)
        scores = scores.masked_fill_(is_empty | is_empty[some, None], float("-inf"))
        pairs = scores.unflatten(-1, (num_blocks, per_block)).unflatten(-3, (-1, per_block))
        return pairs.logsumexp(dim=(-3, -1))

    shape = (len(q_pooled), num_blocks, num_blocks)
    out = fill_scores(score, q_pooled, shape, per_block * len(cells))
    return out.view(*q.shape[:-2], num_blocks, num_blocks)


def score_cell_mass(
    q: Float[Tensor, "*heads slots dim"],
    k: Float[Tensor, "*heads slots dim"],
    counts: Int[Tensor, " blocks"],
    *,
    cell_tokens: int = 16,
    scale: float | None = None,
    allowed: Bool[Tensor, "blocks blocks"] | None = None,
) -> Float[Tensor, "*heads blocks blocks"]:
    """Probabilities between the means of cells, summed over a key block's cells: rows sum to 1.

    The mean over a query block's cells; cells without tokens do not count.

    Args:
        q: Queries.
        k: Keys.
        counts: Tokens of every block.
        cell_tokens: Slots of a cell, which lie side by side in block order; must divide a block's.
        scale: Factor on q.k; None is 1/sqrt(dim).
        allowed: Pairs outside it get probability 0 (packed clips).

    Raises:
        ValueError: The cells do not divide the blocks.

    Source: DFSAttn (arXiv:2605.23445), jessica-hujie/DFSAttn@dad4ace
    dfsattn/attention_hyvideo.py:25-250.
    """
    cells, per_block = _cells_of(q, counts, cell_tokens)
    scale = 1 / sqrt(q.shape[-1]) if scale is None else scale
    q_pooled, k_pooled = (_pool_cells(x, cells) for x in (q, k))
    return _cell_probabilities(q_pooled, k_pooled, cells == 0, per_block, allowed, scale)


def score_antidiagonals(
    q: Float[Tensor, "*heads slots dim"],
    k: Float[Tensor, "*heads slots dim"],
    counts: Int[Tensor, " blocks"],
    *,
    stride: int = 8,
    scale: float | None = None,
    allowed: Bool[Tensor, "blocks blocks"] | None = None,
) -> Float[Tensor, "*heads blocks blocks"]:
    """Probabilities between cells scored by their antidiagonal, summed over a key block's cells.

    The score of two cells of S tokens is the mean over s < S of s-th keys with (S - 1 - s)-th
    queries, scaled; pairs in which one is missing count as 0, cells without tokens not at all. A
    row is the mean over a query block's cells and sums to 1. Cells of one token give exact
    attention's mass of blocks.

    Args:
        q: Queries.
        k: Keys.
        counts: Tokens of every block.
        stride: Tokens S of a cell, which lie side by side in block order; must divide a block's.
        scale: Factor on q.k; None is 1/sqrt(dim).
        allowed: Pairs outside it get probability 0 (packed clips).

    Raises:
        ValueError: The cells do not divide the blocks.

    Source: XAttention (arXiv:2503.16428), mit-han-lab/x-attention@e379887
    xattn/src/Xattention.py:13-300.
    """
    cells, per_block = _cells_of(q, counts, stride)
    scale = (1 / sqrt(q.shape[-1]) if scale is None else scale) / stride
    queries, keys = (x.unflatten(-2, (-1, stride)).flatten(-2) for x in (q, k))
    return _cell_probabilities(queries, keys, cells == 0, per_block, allowed, scale, stride)


def _cell_probabilities(
    queries: Tensor,
    keys: Tensor,
    is_empty: Tensor,
    per_block: int,
    allowed: Tensor | None,
    scale: float,
    stride: int = 1,
) -> Tensor:
    """Softmax over cells, summed over those of a key block, mean over those of a query block.

    The `stride` parts of a query cell are turned around.
    """
    lead, num_blocks = queries.shape[:-2], len(is_empty) // per_block
    queries, keys = of_heads(queries), of_heads(keys)
    dtype = torch.promote_types(queries.dtype, torch.float32)
    num_cells = (~is_empty).view(num_blocks, per_block).sum(dim=-1)

    def score(head: slice, rows: slice) -> Tensor:
        some = slice(rows.start * per_block, rows.stop * per_block)
        query = queries[head, some].to(dtype).unflatten(-1, (stride, -1)).flip(-2).flatten(-2)
        scores = (query * scale) @ keys[head].to(dtype).transpose(-1, -2)
        scores = scores.masked_fill_(is_empty, float("-inf"))
        pairs = scores.unflatten(-1, (num_blocks, per_block)).unflatten(-3, (-1, per_block))
        if allowed is not None:
            pairs = pairs.masked_fill_(~allowed[rows, None, :, None], float("-inf"))
        probs = pairs.flatten(-2).softmax(dim=-1).unflatten(-1, (num_blocks, per_block)).sum(-1)
        probs = probs.masked_fill_(is_empty[some].view(-1, per_block, 1), 0).sum(dim=-2)
        return probs / num_cells[rows, None]

    shape = (len(queries), num_blocks, num_blocks)
    cost = per_block * (len(is_empty) + keys.shape[-1])
    out = fill_scores(score, keys.new_empty(0, dtype=dtype), shape, 2 * cost)
    return out.view(*lead, num_blocks, num_blocks)


def _cells_of(x: Tensor, counts: Tensor, cell_tokens: int) -> tuple[Tensor, int]:
    """Tokens of every cell, and cells of a block."""
    block = x.shape[-2] // counts.numel()
    if cell_tokens < 1 or block % cell_tokens:
        raise ValueError(
            f"cells must divide a block: got cells of {cell_tokens} tokens for blocks of {block}."
        )
    return filled_slots(counts, block).view(-1, cell_tokens).sum(dim=1), block // cell_tokens


def _pool_cells(x: Tensor, cells: Tensor) -> Tensor:
    return pool_panels(x, cells.clamp_min(1))
