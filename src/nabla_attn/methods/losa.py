"""LoSA: blocks that hold a share of exact attention's mass at an early step, kept from then on."""

from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from nabla_attn.core.cells import score_antidiagonals
from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.select import select_by_mass
from nabla_attn.methods.contract import Method, State
from nabla_attn.methods.parameters import count, share
from nabla_attn.methods.scored import by_heads


def select(q: Tensor, k: Tensor, grid: TokenGrid, params: SimpleNamespace, state: State) -> Tensor:
    """Everything up to a step; behind it the blocks that held the mass at that step."""
    is_early = state.step is not None and state.step <= params.step
    kept = state.memory.get("kept")
    if kept is None or kept.shape[:2] != q.shape[:2] or is_early:
        if is_early and state.step != params.step:
            return _all(q, grid, state)
        kept = state.memory["kept"] = by_heads(partial(_by_mass, params.mass), q, k, state)
    return _all(q, grid, state) if is_early else kept


def _by_mass(share: float, q: Tensor, k: Tensor, state: State) -> Tensor:
    # Cells of one token: exact attention's mass.
    mass = score_antidiagonals(
        q, k, state.counts, stride=1, scale=state.scale, allowed=state.allowed
    )
    return select_by_mass(mass, share)


def _all(q: Tensor, grid: TokenGrid, state: State) -> Tensor:
    count = grid.num_blocks
    mask = torch.ones((*q.shape[:2], count, count), dtype=torch.bool, device=q.device)
    return mask if state.allowed is None else mask & state.allowed


METHOD = Method(
    select=select,
    name="losa",
    title="exact mass of blocks at an early step, kept from then on",
    parameters=(
        share("mass", "the kept probability mass", example=0.95),
        count("step", least=0, default=3),
    ),
    kind="pooled",
    exactness="paper",
    ours="square blocks of the grid for 128 queries by 32 keys",
    paper="arXiv:2608.12032",
    published="losa-0.95",
    needs=("step", "memory"),
)
