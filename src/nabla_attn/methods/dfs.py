"""DFSAttn: top share by probabilities between cells, summed over a block's cells."""

from types import SimpleNamespace

from torch import Tensor

from nabla_attn.core.cells import score_cell_mass
from nabla_attn.core.select import select_top
from nabla_attn.methods.contract import State
from nabla_attn.methods.parameters import count, share
from nabla_attn.methods.scored import num_kept, scored, size_of_cells


def _score(q: Tensor, k: Tensor, params: SimpleNamespace, state: State) -> Tensor:
    cell = size_of_cells(params.cell, q, state)
    scale, allowed = state.scale, state.allowed
    return score_cell_mass(q, k, state.counts, cell_tokens=cell, scale=scale, allowed=allowed)


def _choose(scores: Tensor, params: SimpleNamespace, state: State) -> Tensor:
    return select_top(scores, num_kept(scores, params.share, state, "down"))


METHOD = scored(
    _score,
    _choose,
    name="dfs",
    title="top share by probabilities between cells of 16 tokens",
    parameters=(
        share("share", "kept blocks / all blocks", example=0.3),
        count("cell", most=4096, default=16),
    ),
    exactness="code",
    ours="the map of every step instead of every twelfth, and no lower share later",
    paper="arXiv:2605.23445",
    code="jessica-hujie/DFSAttn@dad4ace dfsattn/attention_hyvideo.py:25-250",
    licence="none",
    published="dfs-0.3_block-2-8-8_order-hilbert",
)
