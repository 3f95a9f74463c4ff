"""Methods that score pairs of blocks in their own way: a few heads at a time, clips apart."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor

from nabla_attn.core.estimates import pool_panels
from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.scores import multiply_blocks
from nabla_attn.core.select import count_of_share
from nabla_attn.methods.contract import Method, State

PANEL_PAIRS = 2**25
"""Scores held at once: 128 MB in fp32."""
PANEL_TOKENS = 2**26
"""Queries or keys held at once, in numbers: 256 MB in fp32."""

Score = Callable[[Tensor, Tensor, SimpleNamespace, State], Tensor]
Choose = Callable[[Tensor, SimpleNamespace, State], Tensor]


def scored(score: Score, choose: Choose, **row: object) -> Method:
    """A method that keeps blocks by scores which it computes from all tokens.

    Args:
        score: Called with q and k [batch, heads, slots, dim] of some heads, parameters and state,
            whose values are of the same heads; returns [batch, heads, q_blocks, kv_blocks].
        choose: Called with scores, minus infinity between packed clips, parameters and state;
            returns the mask.
        row: The other fields of the row.
    """

    def select(
        q: Tensor, k: Tensor, grid: TokenGrid, params: SimpleNamespace, state: State
    ) -> Tensor:
        def keep(q: Tensor, k: Tensor, state: State) -> Tensor:
            return choose(clips_apart(score(q, k, params, state), state), params, state)

        return by_heads(keep, q, k, state)

    return Method(select=select, **row)  # type: ignore[arg-type]


def by_heads(
    keep: Callable[[Tensor, Tensor, State], Tensor], q: Tensor, k: Tensor, state: State
) -> Tensor:
    """The mask of all heads, from a function of q, k and state of some of them."""
    pairs, tokens = len(q) * state.counts.numel() ** 2, q[:, 0].numel()
    heads = max(1, min(PANEL_PAIRS // pairs, PANEL_TOKENS // tokens))
    parts = []
    for start in range(0, q.shape[1], heads):
        some = slice(start, start + heads)
        mine = replace(state, v=None if state.v is None else state.v[:, some])
        parts.append(keep(q[:, some], k[:, some], mine))
    mask = torch.cat(parts, dim=1)
    return mask if state.allowed is None else mask & state.allowed


def clips_apart(scores: Tensor, state: State) -> Tensor:
    """Scores with minus infinity between packed clips."""
    return scores if state.allowed is None else scores.masked_fill(~state.allowed, float("-inf"))


def products(q: Tensor, k: Tensor, params: SimpleNamespace, state: State) -> Tensor:
    """Scaled products of means."""
    pooled_q, pooled_k = (pool_panels(x, state.counts) for x in (q, k))
    return multiply_blocks(pooled_q, pooled_k, scale=state.scale)


def num_kept(scores: Tensor, share: float, state: State, rounding: str = "up") -> Tensor:
    """Blocks that make up a share of those that each row may see [1 or q_blocks, 1]."""
    allowed = state.allowed
    counts = [scores.shape[-1]] if allowed is None else allowed.sum(dim=-1).tolist()
    found = {count: float(count_of_share(share, count, rounding)) for count in set(counts)}
    return scores.new_tensor([found[count] for count in counts])[:, None]


def size_of_cells(wanted: int, q: Tensor, state: State) -> int:
    """The least number of tokens, `wanted` or more, that divides a block."""
    block = q.shape[2] // state.counts.numel()
    return next((size for size in range(wanted, block) if block % size == 0), block)
