"""BSA: half of each block's queries, those least like its centre, and kept mass of key blocks."""

from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from nabla_attn.core.block_map import HeadOrder
from nabla_attn.core.estimates import filled_slots
from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.order import TokenLayout, block_order
from nabla_attn.core.scores import pool_blocks, score_blocks
from nabla_attn.core.select import select_by_mass, select_top
from nabla_attn.methods.contract import Method, Selection, State
from nabla_attn.methods.parameters import count, share


def select(
    q: Tensor, k: Tensor, grid: TokenGrid, params: SimpleNamespace, state: State
) -> Selection:
    """Queries that are left out take the output of the nearest one that is kept."""
    block, counts = grid.block.tokens, state.counts
    dtype = torch.promote_types(q.dtype, torch.float32)
    queries = q.to(dtype).unflatten(2, (-1, block))
    is_kept = kept_queries(queries, counts, params.queries)
    num_kept = is_kept[0, 0].sum(dim=-1)
    means = (queries * is_kept[..., None]).sum(dim=3) / num_kept[:, None]
    probs = score_blocks(means, pool_blocks(k, counts), scale=state.scale)
    mask = select_by_mass(probs, params.mass)
    mask = mask | select_top(probs, probs.new_tensor(min(params.least, grid.num_blocks)))
    return Selection(mask, *_orders(is_kept, grid))


def kept_queries(queries: Tensor, counts: Tensor, share: float) -> Tensor:
    """Which queries [batch, heads, blocks, block_tokens] of each block are attended."""
    block = queries.shape[3]
    is_token = filled_slots(counts, block)
    centre = (counts // 2)[:, None, None].expand(*queries.shape[:2], -1, 1, queries.shape[-1])
    likeness = cosine_similarity(queries, queries.gather(3, centre), dim=-1)
    likeness = likeness.masked_fill(~is_token, float("inf"))
    place = likeness.argsort(dim=-1, stable=True).argsort(dim=-1)
    return place < (share * counts).ceil().clamp_min(1)[:, None]


def _orders(is_kept: Tensor, grid: TokenGrid) -> tuple[HeadOrder, HeadOrder]:
    """Kept queries at the front of their blocks, and keys in block order."""
    order = block_order(TokenLayout(grid), is_kept.device)
    token = order.to_blocks.index_fill(0, order.empty_slots, -1)
    block = grid.block.tokens
    # The nearest kept query of each slot; of two the first.
    place = torch.arange(block, device=is_kept.device)
    distance = (place[:, None] - place).abs() + block * ~is_kept[..., None, :]
    nearest = distance.argmin(dim=-1)
    front = (~is_kept).to(torch.int8).argsort(dim=-1, stable=True)
    rank = front.argsort(dim=-1).gather(-1, nearest)
    first = torch.arange(grid.num_blocks, device=is_kept.device)[:, None] * block
    slots = (rank + first).flatten(2)[:, :, order.to_raster]
    tokens = token.view(-1, block).expand_as(front).gather(-1, front)
    tokens = tokens.masked_fill(~is_kept.gather(-1, front), -1).flatten(2)
    plain = HeadOrder(token[None, None], order.to_raster[None, None])
    return HeadOrder(tokens, slots), plain


METHOD = Method(
    select=select,
    name="bsa",
    title="half of the queries of each block, and kept mass of key blocks",
    parameters=(
        share("mass", "the kept probability mass", example=0.9),
        share("queries", "kept queries / all queries of a block", default=0.5),
        count("least", default=4),
    ),
    exactness="code",
    paper="arXiv:2509.01085",
    code="hao-ai-lab/FastVideo@2f3d407 fastvideo/attention/backends/bsa_attn.py",
    licence="Apache-2.0",
    published="bsa-0.9_block-4-4-4",
    packs=False,
)
