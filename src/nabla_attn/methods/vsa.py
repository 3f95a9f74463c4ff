"""VSA: top share of pooled blocks, and the pooled attention itself through a gate."""

from types import SimpleNamespace

import torch
from torch import Tensor

from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.scores import pool_blocks
from nabla_attn.core.select import select_top
from nabla_attn.methods.contract import Method, Selection, State
from nabla_attn.methods.parameters import number, share
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
        coarse = (probs @ pool_blocks(v, state.counts)).repeat_interleave(grid.block.tokens, dim=2)
        gated = out[:, :, video] + params.gate * coarse.to(out.dtype)
        return torch.cat([gated, out[:, :, grid.num_slots :]], dim=2)

    return Selection(by_heads(keep, q, k, state), finish=finish if params.gate else None)


METHOD = Method(
    select=select,
    name="vsa",
    title="top share of pooled blocks, with a coarse output through a gate",
    parameters=(
        share("share", "kept blocks / all blocks", example=0.1),
        number("gate", least=-10, most=10, default=0.0),
    ),
    kind="trained",
    exactness="code",
    ours="one number for the gate, which in trained models is a linear layer of hidden states",
    paper="arXiv:2505.13389",
    code="hao-ai-lab/FastVideo@2f3d407 fastvideo/attention/backends/video_sparse_attn.py:161",
    licence="Apache-2.0",
    published="vsa-0.1_block-4-4-4",
    keeps_constants=False,
)
