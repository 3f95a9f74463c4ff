"""Sliding tiles: blocks within half a window of each other, clipped at the borders."""

from types import SimpleNamespace

import torch
from torch import Tensor

from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.window import build_window_map
from nabla_attn.methods.contract import State, static
from nabla_attn.methods.parameters import sides


def _keep(grid: TokenGrid, params: SimpleNamespace, state: State, device: torch.device) -> Tensor:
    return build_window_map(grid, params.window, device)


METHOD = static(
    _keep,
    name="sta",
    title="sliding window of tiles",
    parameters=(sides("window"),),
    exactness="code",
    paper="arXiv:2502.04507",
    code="gen-ai-team/Wan2.1-NABLA@d5c50a8 wan/modules/attention.py:243-254",
    licence="Apache-2.0",
    published="sta-11-3-3",
)
