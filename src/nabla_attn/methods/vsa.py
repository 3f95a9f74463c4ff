"""VSA: top share of pooled blocks, and the pooled attention itself through a gate."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.scores import pool_blocks
from nabla_attn.core.select import select_top
from nabla_attn.methods.contract import Method, Selection, State, apply_linear, zero_linear
from nabla_attn.methods.parameters import share
from nabla_attn.methods.scored import by_heads, clips_apart, num_kept, products


def select(
    q: Tensor, k: Tensor, grid: TokenGrid, params: SimpleNamespace, state: State
) -> Selection:
    """Blocks by pooled score; the output gains gate x pooled attention where there is a gate."""

    def keep(q: Tensor, k: Tensor, state: State) -> Tensor:
        scores = clips_apart(products(q, k, params, state), state)
        return select_top(scores, num_kept(scores, params.share, state))

    def finish(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        video = slice(grid.num_slots)
        q, k, v = (x[:, :, video] for x in (q, k, v))
        probs = clips_apart(products(q, k, params, state), state).softmax(dim=-1)
        coarse = (probs @ pool_blocks(v, state.counts)).to(out.dtype)
        gate = gates(state, q.shape[-1]).unflatten(2, (-1, grid.block.tokens))
        gained = out[:, :, video] + (gate * coarse[:, :, :, None]).flatten(2, 3)
        return torch.cat([gained, out[:, :, grid.num_slots :]], dim=2)

    return Selection(by_heads(keep, q, k, state), finish=finish if state.parts else None)


def gates(state: State, dim: int) -> Tensor:
    """The gates [batch, heads, slots, dim] of the call's heads, one number for each of a query."""
    assert state.parts is not None and state.hidden is not None
    weight, bias = (state.parts[name].unflatten(0, (-1, dim)) for name in ("weight", "bias"))
    if state.heads is not None:
        weight, bias = weight[list(state.heads)], bias[list(state.heads)]
    found = apply_linear(state.hidden, weight.flatten(0, 1), bias.flatten())
    return found.unflatten(2, (-1, dim)).transpose(1, 2)


def parts(*, heads: int, dim: int, width: int) -> nn.Linear:
    """A linear layer from hidden states to a gate for each number of the output."""
    return zero_linear(width, heads * dim)


METHOD = Method(
    select=select,
    name="vsa",
    title="top share of pooled blocks, with a coarse output through a gate",
    parameters=(share("share", "kept blocks / all blocks", example=0.1),),
    kind="trained",
    exactness="code",
    paper="arXiv:2505.13389",
    code="hao-ai-lab/FastVideo@2f3d407 fastvideo/attention/backends/video_sparse_attn.py:161, "
    "models/dits/wanvideo.py (to_gate_compress)",
    licence="Apache-2.0",
    published="vsa-0.1_block-4-4-4",
    needs=("hidden",),
    keeps_constants=False,
    parts=parts,
)
