"""LiteAttention: blocks whose scores stay far below their row's highest are not looked at again."""

from types import SimpleNamespace

import torch
from torch import Tensor

from nabla_attn.core.estimates import fill_scores, filled_slots, of_heads
from nabla_attn.core.grid import TokenGrid
from nabla_attn.methods.contract import Method, State
from nabla_attn.methods.parameters import number


def select(q: Tensor, k: Tensor, grid: TokenGrid, params: SimpleNamespace, state: State) -> Tensor:
    """What earlier steps left; what this step finds low is dropped from the next on."""
    count = grid.num_blocks
    kept = state.memory.get("kept")
    if kept is None or kept.shape[:2] != q.shape[:2]:
        kept = torch.ones((*q.shape[:2], count, count), dtype=torch.bool, device=q.device)
        kept = kept if state.allowed is None else kept & state.allowed
    state.memory["kept"] = kept & ~(highest_scores(q, k, kept, state) < params.level)
    return kept


def highest_scores(q: Tensor, k: Tensor, kept: Tensor, state: State) -> Tensor:
    """The highest score of every pair of blocks, each token's less its highest over kept blocks."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    count, block = state.counts.numel(), q.shape[2] // state.counts.numel()
    queries, keys, mask = of_heads(q), of_heads(k), kept.flatten(0, 1)
    is_token = filled_slots(state.counts, block)

    def score(head: slice, rows: slice) -> Tensor:
        some = slice(rows.start * block, rows.stop * block)
        scores = (queries[head, some].to(dtype) * state.scale) @ keys[head].to(dtype).transpose(
            1, 2
        )
        scores = scores.masked_fill_(~is_token.flatten(), float("-inf"))
        highest = scores.unflatten(-1, (count, block)).amax(dim=-1)
        highest = highest.unflatten(1, (-1, block))
        highest = highest.masked_fill_(~mask[head, rows, None], float("-inf"))
        highest = highest - highest.amax(dim=-1, keepdim=True)
        return highest.masked_fill_(~is_token[rows, :, None], float("-inf")).amax(dim=2)

    like = q.new_empty(0, dtype=dtype)
    found = fill_scores(score, like, (len(queries), count, count), block * q.shape[2])
    return found.view(kept.shape)


METHOD = Method(
    select=select,
    name="lite",
    title="blocks that scored too low in an earlier step are left out from then on",
    parameters=(number("level", least=-1e4, most=0, example=-5.0),),
    kind="pooled",
    exactness="reconstructed",
    ours="scores are held against a row's highest, not against the highest met so far",
    paper="arXiv:2511.11062",
    code="moonmath-ai/LiteAttention@f316493 README",
    licence="dual",
    published="lite--5_block-2-8-8",
    needs=("memory",),
)
