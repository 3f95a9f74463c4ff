"""Chipmunk: single key columns by exact sums at full steps, and what they lack from a cache."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from nabla_attn.core.block_map import HeadOrder
from nabla_attn.core.columns import order_of_columns, split_columns
from nabla_attn.core.estimates import filled_slots
from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.order import TokenLayout, block_order
from nabla_attn.core.window import build_window_map
from nabla_attn.methods.contract import Method, Selection, State
from nabla_attn.methods.parameters import count, number, share, word


def select(
    q: Tensor, k: Tensor, grid: TokenGrid, params: SimpleNamespace, state: State
) -> Selection:
    """Everything at full steps, whose output is split; kept columns and the rest of it between."""
    memory = state.memory
    every = torch.ones(1, 1, grid.num_blocks, grid.num_blocks, dtype=torch.bool, device=q.device)
    if state.layer < params.layers:
        return Selection(every)
    kept, shape = memory.get("kept"), (*q.shape[:2], grid.num_blocks)
    if kept is None or kept.shape[:3] != shape or (state.step or 0) % params.period == 0:
        return Selection(every, finish=partial(_split, grid, params, state))
    rest = memory["rest"]

    def finish(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        text = out[:, :, grid.num_slots :]
        return torch.cat([out[:, :, : grid.num_slots] + rest.to(out.dtype), text], dim=2)

    if params.unit == "blocks":
        return Selection(kept, finish=finish)
    return replace(_in_columns(kept, grid), finish=finish)


def _in_columns(kept: Tensor, grid: TokenGrid) -> Selection:
    """A copy of its columns for every row block, and behind them all keys once, for text."""
    block, order = grid.block.tokens, block_order(TokenLayout(grid), kept.device)
    token = order.to_blocks.index_fill(0, order.empty_slots, -1)
    plain = HeadOrder(token[None, None], order.to_raster[None, None])
    columns, mask = order_of_columns(kept, block)
    tokens = torch.where(columns >= 0, token[columns.clamp_min(0)], -1)
    tokens = torch.cat([tokens, token.expand(*kept.shape[:2], -1)], dim=2)
    text_keys = torch.arange(tokens.shape[2] // block, device=kept.device) >= mask.shape[3]
    mask = torch.nn.functional.pad(mask, (0, grid.num_blocks))
    return Selection(mask, plain, HeadOrder(tokens, plain.slots), text_keys=text_keys)


def _split(
    grid: TokenGrid,
    params: SimpleNamespace,
    state: State,
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> Tensor:
    """Remember the columns to keep and what the output has beside them; the output stays."""
    memory, block = state.memory, grid.block.tokens
    if "lse" in memory and memory["lse"].shape != q.shape[:3]:
        memory.clear()
    is_token = filled_slots(state.counts, block).flatten()
    local = torch.zeros(grid.num_blocks, grid.num_blocks, dtype=torch.bool, device=q.device)
    if params.local:
        local = build_window_map(grid, (params.local,) * 3, q.device)
    draw = torch.Generator().manual_seed(1000 * (state.step or 0) + state.layer)

    def choose(sums: Tensor, row: int) -> Tensor:
        # The same columns at random in all samples and heads.
        near, can, number = local[row].repeat_interleave(block), is_token, grid.num_tokens
        if params.unit == "blocks":
            sums = sums.unflatten(-1, (grid.num_blocks, block)).sum(dim=-1)
            near, can, number = local[row], state.counts > 0, grid.num_blocks
        sums = sums.masked_fill(~can, -1)
        top = max(1, round(params.share * number))
        kept = torch.zeros_like(sums, dtype=torch.bool)
        kept.scatter_(-1, sums.argsort(dim=-1, descending=True, stable=True)[..., :top], True)
        random = torch.rand(sums.shape[-1], generator=draw) < params.random
        return (kept | near | random.to(kept.device)) & can

    memory |= split_columns(
        out,
        q,
        k,
        v,
        memory.get("lse"),
        choose,
        counts=state.counts,
        block_tokens=block,
        valid=state.valid,
        scale=state.scale,
    )
    return out


METHOD = Method(
    select=select,
    name="chipmunk",
    title="key columns by exact sums, and a cache of what they lack",
    parameters=(
        share("share", "kept columns / all columns", example=0.1),
        number("random", least=0, most=1, default=0.01),
        count("local", least=0, default=0),
        count("period", default=10),
        count("layers", least=0, default=2),
        word("unit", ("columns", "blocks"), default="columns"),
    ),
    exactness="code",
    ours="rows in the grid's blocks in place of 192; the number of columns is not rounded to what "
    "a kernel takes; columns at random are the same in all heads; the local window is in blocks; "
    "text is always attended, and its own rows are dense; `blocks` keeps whole blocks by the sum "
    "of their columns, which needs no copies of keys",
    paper="arXiv:2506.03275",
    code="sandyresearch/chipmunk@64d197c src/chipmunk/modules/attn.py:20-150",
    published="chipmunk-0.1-0.01-5_block-4-6-8",
    needs=("step", "layer", "memory"),
    is_trainable=False,
    packs=False,
)
