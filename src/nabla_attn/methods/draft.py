"""Draft attention: the highest pooled probabilities of a head, whatever their row."""

from types import SimpleNamespace

from torch import Tensor

from nabla_attn.core.select import select_by_quantile
from nabla_attn.methods.contract import State
from nabla_attn.methods.parameters import share
from nabla_attn.methods.scored import clips_apart, products, scored


def _score(q: Tensor, k: Tensor, params: SimpleNamespace, state: State) -> Tensor:
    return clips_apart(products(q, k, params, state), state).softmax(dim=-1)


def _choose(scores: Tensor, params: SimpleNamespace, state: State) -> Tensor:
    return select_by_quantile(scores, 1 - params.share)


METHOD = scored(
    _score,
    _choose,
    name="draft",
    title="highest share of a head's pooled probabilities",
    parameters=(share("share", "kept pairs / all pairs of a head", example=0.25),),
    exactness="code",
    ours="a row of which nothing is kept keeps its highest block",
    paper="arXiv:2505.14708",
    code="shawnricecake/draft-attention@f3c81d5 draft_attention.py",
    licence="none",
    published="draft-0.25_block-1-8-16",
    packs=False,
)
