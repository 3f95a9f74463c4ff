"""MiniMax's cube attention: top share of pooled cubes, whose share falls over the steps."""

from types import SimpleNamespace

from torch import Tensor

from nabla_attn.core.select import select_top
from nabla_attn.methods.contract import State
from nabla_attn.methods.parameters import share
from nabla_attn.methods.scored import num_kept, products, scored

# Shares of 50 steps, and how many steps have them; the rest has the last.
RAMP = (
    *((1.0, 2), (0.55, 1), (0.45, 1), (0.35, 2), (0.3, 1), (0.25, 2)),
    *((0.2, 3), (0.15, 3), (0.1, 4)),
)
LAST = 0.05
NUM_STEPS = 50


def share_of_step(params: SimpleNamespace, state: State) -> float:
    """The share of this step: the published one of its place in the run, or the last."""
    step, left = state.step, params.share
    if step is None or state.num_steps is None:
        return float(left)
    place = step * NUM_STEPS // state.num_steps
    for value, count in RAMP:
        if place < count:
            return max(value, left)
        place -= count
    return float(left)


def _choose(scores: Tensor, params: SimpleNamespace, state: State) -> Tensor:
    return select_top(scores, num_kept(scores, share_of_step(params, state), state, "down"))


METHOD = scored(
    products,
    _choose,
    name="cube",
    title="top share of pooled cubes, falling over the steps",
    parameters=(share("share", "kept cubes / all cubes in the last steps", default=LAST),),
    exactness="code",
    ours="the schedule at other numbers of steps than 50",
    paper="github.com/sgl-project/sglang/pull/34893",
    code="sgl-project/sglang cube_sparse_attn/mask.py (commit not known)",
    licence="Apache-2.0",
    published="cube-0.05_block-4-4-4",
    needs=("step",),
)
