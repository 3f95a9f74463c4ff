"""SubBlock: top share by the log-sum-exp of scores between cells of some tokens."""

from types import SimpleNamespace

from torch import Tensor

from nabla_attn.core.cells import score_cells
from nabla_attn.core.select import select_top
from nabla_attn.methods.contract import State
from nabla_attn.methods.parameters import count, share
from nabla_attn.methods.scored import num_kept, scored, size_of_cells


def _score(q: Tensor, k: Tensor, params: SimpleNamespace, state: State) -> Tensor:
    cell = size_of_cells(params.cell, q, state)
    return score_cells(q, k, state.counts, cell_tokens=cell, scale=state.scale)


def _choose(scores: Tensor, params: SimpleNamespace, state: State) -> Tensor:
    kept = num_kept(scores, params.share, state)
    return select_top(scores, (kept / params.multiple).ceil() * params.multiple)


METHOD = scored(
    _score,
    _choose,
    name="subblock",
    title="top share by the log-sum-exp over cells of 16 tokens",
    parameters=(
        share("share", "kept blocks / all blocks", example=0.25),
        count("cell", most=4096, default=16),
        count("multiple", default=8),
    ),
    exactness="code",
    paper="github.com/sgl-project/sglang/pull/34148",
    code="sgl-project/sglang subblock_sparse/router.py (commit not known)",
    licence="Apache-2.0",
    published="subblock-0.25",
)
