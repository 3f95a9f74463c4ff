"""MInference's vertical and slash lines for video: columns and diagonals from sampled queries."""

from types import SimpleNamespace

import torch
from torch import Tensor

from nabla_attn.core.estimates import filled_slots
from nabla_attn.core.grid import TokenGrid
from nabla_attn.methods.contract import Method, State
from nabla_attn.methods.parameters import count
from nabla_attn.methods.scored import by_heads

NUM_FORCED = 30
"""Columns from the first on, and diagonals on both sides of the main one, that are always kept."""


def select(q: Tensor, k: Tensor, grid: TokenGrid, params: SimpleNamespace, state: State) -> Tensor:
    """Blocks that a kept column or a kept diagonal of token pairs goes through."""
    block = grid.block.tokens
    slots = filled_slots(state.counts, block).flatten().nonzero().flatten()
    number = min(params.sample, len(slots))
    sampled = slots[torch.arange(number, device=slots.device) * len(slots) // number]

    def keep(q: Tensor, k: Tensor, state: State) -> Tensor:
        dtype = torch.promote_types(q.dtype, torch.float32)
        probs = torch.zeros((*q.shape[:2], number, q.shape[2]), dtype=dtype, device=q.device)
        rows = q[:, :, sampled].to(dtype) * state.scale
        probs[..., slots] = (rows @ k[:, :, slots].to(dtype).transpose(-1, -2)).softmax(dim=-1)
        columns = probs.sum(dim=2)
        columns[..., slots[:NUM_FORCED]] = float("inf")
        kept = _highest(columns, params.vertical).unflatten(-1, (-1, block)).any(dim=-1)
        return kept[:, :, None] | _slashes(probs, sampled, params.slash, block)

    return by_heads(keep, q, k, state)


def _slashes(probs: Tensor, sampled: Tensor, number: int, block: int) -> Tensor:
    """Blocks that the highest diagonals go through; a diagonal is key slot - query slot."""
    length = probs.shape[-1]
    diagonal = torch.arange(length, device=probs.device) - sampled[:, None] + length - 1
    sums = probs.new_zeros((*probs.shape[:2], 2 * length - 1))
    sums.scatter_add_(-1, diagonal.flatten().expand(*sums.shape[:2], -1), probs.flatten(2))
    sums[..., length - NUM_FORCED : length + NUM_FORCED - 1] = float("inf")
    offsets = torch.arange(2 * length - 1, device=probs.device) - (length - 1)
    count = length // block
    kept = _highest(sums, number)
    # A diagonal crosses two diagonals of blocks, or one where it goes through their corners.
    through = kept.new_zeros((*kept.shape[:2], 2 * count + 1))
    for shift in (0, block - 1):
        at = (offsets + shift).div(block, rounding_mode="floor") + count
        through = through.scatter_reduce(-1, at.expand_as(kept), kept, "amax")
    place = torch.arange(count, device=probs.device)
    return through[..., place - place[:, None] + count]


def _highest(sums: Tensor, number: int) -> Tensor:
    """The highest of each row, ties to the lower index, no fewer than those that are forced."""
    number = min(max(number, NUM_FORCED), sums.shape[-1])
    order = sums.argsort(dim=-1, descending=True, stable=True)[..., :number]
    return torch.zeros_like(sums, dtype=torch.bool).scatter_(-1, order, True)


METHOD = Method(
    select=select,
    name="minference",
    title="columns and diagonals of token pairs, from sampled queries",
    parameters=(
        count("vertical", example=500),
        count("slash", example=700),
        count("sample", default=64),
    ),
    exactness="reconstructed",
    ours="queries sampled evenly instead of the last, diagonals on both sides, whole blocks kept",
    paper="arXiv:2407.02490",
    code="microsoft/MInference@fb56c91 minference/modules/minference_forward.py:118-250",
    licence="MIT",
    published="minference-500-700",
    packs=False,
)
