"""Jenga: pooled probability mass with a floor, and blocks that touch, along a Hilbert curve."""

from types import SimpleNamespace

from torch import Tensor

from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.scores import pool_blocks, score_blocks
from nabla_attn.core.select import select_past_mass
from nabla_attn.core.window import build_neighbour_map
from nabla_attn.methods.contract import Method, State
from nabla_attn.methods.parameters import number, share, word


def _select(q: Tensor, k: Tensor, grid: TokenGrid, params: SimpleNamespace, state: State) -> Tensor:
    pooled = (pool_blocks(x, state.counts) for x in (q, k))
    probs = score_blocks(*pooled, scale=state.scale, allowed=state.allowed)
    least = max(1, int(params.floor * grid.num_blocks))
    mask = select_past_mass(probs, params.mass, num_least=least)
    mask |= build_neighbour_map(grid, q.device)
    if params.frame == "first":
        _join_first_frames_(mask, grid)
    return mask if state.allowed is None else mask & state.allowed


def _join_first_frames_(mask: Tensor, grid: TokenGrid) -> None:
    """Let the first blocks of each clip see each other, as many as a frame fills."""
    start, per_time = 0, grid.num_blocks // grid.blocks[0]
    for frames, times in zip(grid.segment_frames, grid.segment_blocks, strict=True):
        first = slice(start, start + times * per_time // frames)
        mask[..., first, first] = True
        start += times * per_time


METHOD = Method(
    name="jenga",
    title="pooled probability mass with a floor, and blocks that touch",
    select=_select,
    parameters=(
        share("mass", "the kept probability mass", example=0.3),
        number("floor", least=0, most=1, default=0.25),
        word("frame", ("free", "first"), default="free"),
    ),
    kind="pooled",
    exactness="code",
    paper="arXiv:2505.16864",
    code="dvlab-research/Jenga@6905150 wan/modules/attention_block_triton_diffres.py:305-410, "
    "gilbert.py:332-679",
    licence="none",
    published="jenga-0.9-0.25-first_block-2-8-8_order-slices-1",
)
