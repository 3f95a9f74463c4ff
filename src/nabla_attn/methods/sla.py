"""SLA: top share of pooled blocks, and linear attention over all tokens through a projection."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from nabla_attn.core.estimates import filled_slots
from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.select import select_top
from nabla_attn.methods.contract import Method, Selection, State, apply_linear, zero_linear
from nabla_attn.methods.parameters import share
from nabla_attn.methods.scored import by_heads, clips_apart, num_kept, products

EPSILON = 1e-5
"""Number added to what linear attention divides by."""


def select(
    q: Tensor, k: Tensor, grid: TokenGrid, params: SimpleNamespace, state: State
) -> Selection:
    """Blocks by pooled score; the output gains linear attention where there is a projection."""

    def keep(q: Tensor, k: Tensor, state: State) -> Tensor:
        scores = clips_apart(products(q, k, params, state), state)
        return select_top(scores, num_kept(scores, params.share, state, "down"))

    def finish(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert state.parts is not None
        video = slice(grid.num_slots)
        q, k, v = (x[:, :, video] for x in (q, k, v))
        linear = linear_attention(q, k, v, state)
        linear = apply_linear(linear, state.parts["weight"], state.parts["bias"])
        gained = out[:, :, video] + linear.to(out.dtype)
        return torch.cat([gained, out[:, :, grid.num_slots :]], dim=2)

    return Selection(by_heads(keep, q, k, state), finish=finish if state.parts else None)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, state: State) -> Tensor:
    """phi(q) (sum of phi(k) vᵀ) / (phi(q) sum of phi(k)), with phi the softmax over dimensions."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    is_token = filled_slots(state.counts, q.shape[2] // state.counts.numel()).flatten()
    q, k = (x.to(dtype).softmax(dim=-1) for x in (q, k))
    k = k * is_token[:, None]
    return (q @ (k.mT @ v.to(dtype))) / (EPSILON + q @ k.sum(dim=2)[..., None])


def parts(*, heads: int, dim: int, width: int) -> nn.Linear:
    """The projection of a head's linear attention, one for all heads."""
    return zero_linear(dim, dim)


METHOD = Method(
    select=select,
    name="sla",
    title="top share of pooled blocks, with linear attention through a projection",
    parameters=(share("share", "kept blocks / all blocks", example=0.05),),
    kind="trained",
    exactness="code",
    paper="arXiv:2509.24006",
    code="thu-ml/SLA@d973e55 sparse_linear_attention/core.py:24-103",
    licence="Apache-2.0",
    published="sla-0.05",
    keeps_constants=False,
    packs=False,
    parts=parts,
)
