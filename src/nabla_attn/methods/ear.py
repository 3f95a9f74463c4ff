"""SVG-EAR's rule on blocks: those whose centroid errs most, as many as kept mass would take."""

from math import log
from types import SimpleNamespace

import torch
from torch import Tensor

from nabla_attn.core.estimates import score_centroid_error
from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.select import select_by_mass
from nabla_attn.methods.contract import Method, State
from nabla_attn.methods.parameters import share
from nabla_attn.methods.scored import by_heads, clips_apart, products

_LEAST_ERROR = 1e-8


def select(q: Tensor, k: Tensor, grid: TokenGrid, params: SimpleNamespace, state: State) -> Tensor:
    """Blocks by error, until they hold as many keys as the blocks of the kept mass would."""

    def keep(q: Tensor, k: Tensor, state: State) -> Tensor:
        scores = clips_apart(products(q, k, params, state), state)
        counts = state.counts.to(scores.dtype)
        by_mass = select_by_mass((scores + counts.log()).softmax(dim=-1), params.mass)
        budget = by_mass.to(scores.dtype) @ counts[:, None]
        assert state.v is not None
        errors = score_centroid_error(q, k, state.v, state.counts, scale=state.scale)
        # Of a pair's area a row counts the keys alone: its queries are the same.
        gains = clips_apart(errors.clamp_min(log(_LEAST_ERROR)) - counts.log(), state)
        order = gains.argsort(dim=-1, descending=True, stable=True)
        area = counts[order]
        is_within = area.cumsum(dim=-1) - area < budget
        kept = torch.zeros_like(is_within).scatter_(-1, order, is_within)
        # What is not a number is kept, so that the output tells.
        return kept | gains.isnan()

    return by_heads(keep, q, k, state)


METHOD = Method(
    select=select,
    name="ear",
    title="blocks whose centroid errs most, as many as a kept mass would take",
    parameters=(share("mass", "the probability whose blocks are the budget", example=0.9),),
    exactness="code",
    ours="blocks of the grid instead of clusters found by k-means, and no floor for heads",
    paper="arXiv:2603.08982",
    code="Mutual-Luo/SVOO@e4ae67b svoo/co_clustering.py:1440-1790",
    licence="Apache-2.0",
    published="ear-0.9_tail-mean",
    needs=("values",),
)
