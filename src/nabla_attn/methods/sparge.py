"""SpargeAttn: pooled blocks, except those whose tokens are unlike each other, which are kept."""

from types import SimpleNamespace

import torch
from torch import Tensor

from nabla_attn.core.estimates import filled_slots, self_similarity
from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.select import select_top, select_within_mass
from nabla_attn.methods.contract import Method, State
from nabla_attn.methods.parameters import number, share, word
from nabla_attn.methods.scored import by_heads, clips_apart, num_kept, products


def select(q: Tensor, k: Tensor, grid: TokenGrid, params: SimpleNamespace, state: State) -> Tensor:
    """Blocks by pooled probability; rows and columns whose means say little are kept whole."""
    tokens = state.counts.sum()

    def keep(q: Tensor, k: Tensor, state: State) -> Tensor:
        dtype = torch.promote_types(k.dtype, torch.float32)
        k = _filled(k - k.sum(dim=2, keepdim=True, dtype=dtype) / tokens, state)
        unlike_q, unlike_k = (
            ~(self_similarity(x, state.counts) > params.similarity) for x in (q, k)
        )
        scores = clips_apart(products(q.to(dtype), k, params, state), state)
        probs = scores.masked_fill(unlike_k[:, :, None], float("-inf")).softmax(dim=-1)
        # A row of which nothing is left to choose from is not a number, and keeps all.
        if params.rule == "mass":
            kept = select_within_mass(probs, params.amount)
        else:
            kept = select_top(probs, num_kept(probs, params.amount, state, "down"))
        return kept | unlike_k[:, :, None] | unlike_q[..., None]

    return by_heads(keep, q, k, state)


def _filled(x: Tensor, state: State) -> Tensor:
    """Tokens with zeros in empty slots again."""
    is_token = filled_slots(state.counts, x.shape[2] // state.counts.numel())
    return x.masked_fill(~is_token.flatten()[:, None], 0)


METHOD = Method(
    select=select,
    name="sparge",
    title="pooled blocks, and all whose tokens are unlike each other",
    parameters=(
        share("amount", "kept blocks / all blocks, or kept mass", example=0.5),
        number("similarity", least=-1, most=1, default=-0.1),
        word("rule", ("share", "mass"), default="share"),
    ),
    exactness="code",
    ours="square blocks of the grid for 128 queries by 64 keys",
    paper="arXiv:2502.18137",
    code="thu-ml/SpargeAttn@bfd980b spas_sage_attn/utils.py:319-380",
    licence="Apache-2.0",
    published="sparge-0.5",
)
