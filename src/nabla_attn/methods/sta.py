"""Sliding tiles: blocks within half a window of each other, in each published reading of it."""

from functools import lru_cache
from types import SimpleNamespace

import torch
from torch import Tensor

from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.neighbours import axis_neighbours, join_axes
from nabla_attn.core.window import build_window_map
from nabla_attn.methods.contract import State, static
from nabla_attn.methods.parameters import sides, word

READINGS = ("clipped", "exact", "wide")


def _keep(grid: TokenGrid, params: SimpleNamespace, state: State, device: torch.device) -> Tensor:
    if params.reading == "clipped":
        return build_window_map(grid, params.window, device)
    is_wide = params.reading == "wide"
    window = tuple(side // 2 * 2 + 1 if is_wide else side for side in params.window)
    return _shifted(grid, window, device)


@lru_cache(maxsize=32)
def _shifted(grid: TokenGrid, window: tuple[int, ...], device: torch.device) -> Tensor:
    """Windows that are moved inwards at the borders, so that all are of one size."""
    time, rows, columns = window
    with torch.inference_mode(False), torch.no_grad():
        return join_axes(
            grid,
            lambda frames: axis_neighbours(-(-frames // grid.block.frames), time),
            axis_neighbours(grid.blocks[1], rows),
            axis_neighbours(grid.blocks[2], columns),
        ).to(device)


METHOD = static(
    _keep,
    name="sta",
    title="sliding window of tiles",
    parameters=(sides("window"), word("reading", READINGS, default="clipped")),
    exactness="code",
    ours="clipped is NABLA's: cut at the borders, an even side acts as the next odd one; exact is "
    "attention-gym's: moved inwards at the borders, an even side covers as many tiles; wide is "
    "FastVideo's: moved inwards, an even side covers one more",
    paper="arXiv:2502.04507",
    code="gen-ai-team/Wan2.1-NABLA@d5c50a8 wan/modules/attention.py:243-254; "
    "meta-pytorch/attention-gym@7fdb85d attn_gym/masks/sta.py; hao-ai-lab/FastVideo "
    "sliding_tile_attn.py (branch sta_do_not_delete)",
    licence="Apache-2.0, BSD-3-Clause",
    published="sta-11-3-3",
)
