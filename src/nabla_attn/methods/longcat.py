"""LongCat's block sparse attention: a share of pooled blocks, or a kept mass where that is more."""

from types import SimpleNamespace

from torch import Tensor

from nabla_attn.core.select import select_top, select_within_mass
from nabla_attn.methods.contract import State
from nabla_attn.methods.parameters import number, share
from nabla_attn.methods.scored import num_kept, products, scored


def _choose(scores: Tensor, params: SimpleNamespace, state: State) -> Tensor:
    # Both take the highest, so that their union is the larger of two numbers of blocks.
    kept = select_top(scores, num_kept(scores, params.share, state, "down"))
    if params.mass:
        kept = kept | select_within_mass(scores.softmax(dim=-1), params.mass)
    return kept


METHOD = scored(
    products,
    _choose,
    name="longcat",
    title="top share of pooled blocks, or kept mass where that is more",
    parameters=(
        share("share", "kept blocks / all blocks", example=0.125),
        number("mass", least=0, most=1, default=0.0),
    ),
    exactness="code",
    paper="arXiv:2510.22200",
    code="meituan-longcat/LongCat-Video@6b3f4b8 "
    "longcat_video/block_sparse_attention/bsa_interface.py:207-290",
    licence="MIT",
    published="longcat-0.125_block-4-4-8",
)
