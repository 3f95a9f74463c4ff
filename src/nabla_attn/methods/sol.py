"""Sol-Attn: blocks that score above their row's mean by some standard deviations."""

from math import log
from types import SimpleNamespace

import torch
from torch import Tensor

from nabla_attn.core.scores import multiply_blocks, pool_blocks
from nabla_attn.core.select import first_highest
from nabla_attn.methods.contract import State
from nabla_attn.methods.parameters import number, word
from nabla_attn.methods.scored import scored

# 1e-6 in the source, whose scores are logarithms to the base 2.
_LEAST_VARIANCE = 1e-6 * log(2) ** 2


def _score(q: Tensor, k: Tensor, params: SimpleNamespace, state: State) -> Tensor:
    """Scores less what their row must reach."""
    pooled_q, pooled_k = (pool_blocks(x, state.counts) for x in (q, k))
    scores = multiply_blocks(pooled_q, pooled_k, scale=state.scale)
    seen = torch.ones_like(scores[0, 0]) if state.allowed is None else state.allowed.to(scores)
    seen = seen / seen.sum(dim=-1, keepdim=True)
    mean = (scores * seen).sum(dim=-1, keepdim=True)
    if params.variance == "exact":
        variance = ((scores - mean).square() * seen).sum(dim=-1, keepdim=True)
    else:
        # That of independent dimensions: a row needs no pass over its scores.
        spread = seen @ pooled_k.square() - (seen @ pooled_k).square()
        variance = ((state.scale * pooled_q).square() * spread.clamp_min(0)).sum(-1, keepdim=True)
    return scores - mean - params.deviations * (variance + _LEAST_VARIANCE).sqrt()


def _choose(scores: Tensor, params: SimpleNamespace, state: State) -> Tensor:
    # What is not a number is kept, so that the output tells.
    return ~(scores <= 0) | first_highest(scores)


METHOD = scored(
    _score,
    _choose,
    name="sol",
    title="blocks above their row's mean by some standard deviations",
    parameters=(
        number("deviations", least=-1e6, most=1e6, example=1.0),
        word("variance", ("diag", "exact"), default="diag"),
    ),
    exactness="code",
    ours="a row with nothing above the threshold keeps its highest block",
    paper="arXiv:2607.24027",
    code="Saganaki22/ComfyUI-sol-attn@930a4d6 sol_kernel/preprocess.py:105-485",
    licence="Apache-2.0",
    published="sol-1_tail-mean",
)
