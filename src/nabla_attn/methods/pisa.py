"""PISA: the blocks about which a mean says least, and which score high; the rest to first order."""

from types import SimpleNamespace

from torch import Tensor

from nabla_attn.core.estimates import score_first_order
from nabla_attn.core.select import select_top
from nabla_attn.methods.contract import State
from nabla_attn.methods.parameters import share
from nabla_attn.methods.scored import num_kept, scored


def _score(q: Tensor, k: Tensor, params: SimpleNamespace, state: State) -> Tensor:
    assert state.v is not None
    return score_first_order(q, k, state.v, state.counts, scale=state.scale)


def _choose(scores: Tensor, params: SimpleNamespace, state: State) -> Tensor:
    return select_top(scores, num_kept(scores, params.share, state, "down"))


METHOD = scored(
    _score,
    _choose,
    name="pisa",
    title="top share by pooled score and the norm of a block's first order",
    parameters=(share("share", "kept blocks / all blocks", example=0.15),),
    exactness="code",
    ours="always with the code's option use_bias, without which the score is that of topk",
    paper="arXiv:2602.01077",
    code="xie-lab-ml/piecewise-sparse-attention@8604494 "
    "piecewise_attn/kernels/piecewise_sparse_attn_tma.py:131-360",
    licence="MIT",
    published="pisa-0.15_tail-first",
    needs=("values",),
)
