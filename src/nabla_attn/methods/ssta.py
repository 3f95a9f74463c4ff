"""SSTA: blocks that are like the query block and unlike the other key blocks."""

from types import SimpleNamespace

from torch import Tensor

from nabla_attn.core.estimates import score_novelty
from nabla_attn.core.select import select_top
from nabla_attn.methods.contract import State
from nabla_attn.methods.parameters import count, number
from nabla_attn.methods.scored import scored


def _score(q: Tensor, k: Tensor, params: SimpleNamespace, state: State) -> Tensor:
    return score_novelty(q, k, state.counts, weight=params.weight, allowed=state.allowed)


def _choose(scores: Tensor, params: SimpleNamespace, state: State) -> Tensor:
    return select_top(scores, scores.new_tensor(params.blocks))


METHOD = scored(
    _score,
    _choose,
    name="ssta",
    title="a number of blocks by likeness less redundancy",
    parameters=(
        count("blocks", example=64),
        number("weight", least=0, most=1, default=0.7),
    ),
    exactness="code",
    paper="arXiv:2511.18870",
    code="Tencent-Hunyuan/HunyuanVideo-1.5@60783e7 modules/ssta_attention.py:90-465",
    licence="Tencent Hunyuan Community",
    published="sta-3-3-3_ssta-64_block-6-8-8",
)
