"""XAttention: kept mass of blocks scored by the antidiagonals of their cells."""

from types import SimpleNamespace

from torch import Tensor

from nabla_attn.core.cells import score_antidiagonals
from nabla_attn.core.select import first_highest, select_by_mass
from nabla_attn.methods.contract import State
from nabla_attn.methods.parameters import count, share
from nabla_attn.methods.scored import scored, size_of_cells


def _score(q: Tensor, k: Tensor, params: SimpleNamespace, state: State) -> Tensor:
    stride = size_of_cells(params.stride, q, state)
    return score_antidiagonals(
        q, k, state.counts, stride=stride, scale=state.scale, allowed=state.allowed
    )


def _choose(scores: Tensor, params: SimpleNamespace, state: State) -> Tensor:
    # The code keeps the first block of all rows: it stands in for indices that are not kept.
    first = first_highest((scores > float("-inf")).to(scores.dtype))
    return select_by_mass(scores.clamp_min(0), params.mass) | first


METHOD = scored(
    _score,
    _choose,
    name="xattn",
    title="kept mass of blocks scored by antidiagonals",
    parameters=(
        share("mass", "the kept probability mass", example=0.9),
        count("stride", most=4096, default=8),
    ),
    exactness="code",
    paper="arXiv:2503.16428",
    code="mit-han-lab/x-attention@e379887 xattn/src/Xattention.py:13-300, utils.py:44-190",
    licence="none",
    published="xattn-0.9-8_block-2-8-8",
)
