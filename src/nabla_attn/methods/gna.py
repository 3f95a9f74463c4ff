"""Generalised neighbourhood attention: windows of tokens along three axes, strided and dilated."""

from functools import lru_cache
from types import SimpleNamespace

import torch
from torch import Tensor

from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.neighbours import axis_neighbours, blocks_along, join_axes
from nabla_attn.methods.contract import State, static
from nabla_attn.methods.parameters import sides, word

CAUSAL = ("none", "frames", "all")


def _check(params: SimpleNamespace) -> None:
    if any(s > w for s, w in zip(params.stride, params.window, strict=True)):
        raise ValueError(
            f"gna: the stride must not exceed the window along any axis: got stride "
            f"{params.stride} for window {params.window}."
        )


def _keep(grid: TokenGrid, params: SimpleNamespace, state: State, device: torch.device) -> Tensor:
    axes = tuple(zip(params.window, params.stride, params.dilation, strict=True))
    return _map(grid, axes, params.causal, device)


@lru_cache(maxsize=32)
def _map(
    grid: TokenGrid, axes: tuple[tuple[int, int, int], ...], causal: str, device: torch.device
) -> Tensor:
    """Blocks of which some token attends one of the other's."""
    is_causal = (causal != "none", causal == "all", causal == "all")
    block = grid.block

    def along(axis: int, length: int) -> Tensor:
        side = (block.frames, block.height, block.width)[axis]
        return blocks_along(axis_neighbours(length, *axes[axis], is_causal=is_causal[axis]), side)

    with torch.inference_mode(False), torch.no_grad():
        rows, columns = along(1, grid.height), along(2, grid.width)
        return join_axes(grid, lambda frames: along(0, frames), rows, columns).to(device)


METHOD = static(
    _keep,
    name="gna",
    title="neighbourhoods of tokens with stride and dilation",
    parameters=(
        sides("window", example=(3, 9, 9)),
        sides("stride", default=(1, 1, 1)),
        sides("dilation", default=(1, 1, 1)),
        word("causal", CAUSAL, default="none"),
    ),
    check=_check,
    exactness="code",
    ours="a block is kept where any pair of its tokens is, so that windows grow to whole blocks "
    "unless strides and windows are multiples of the block's sides; a window may be longer than "
    "the axis and then covers it",
    paper="arXiv:2504.16922",
    code="SHI-Labs/NATTEN@8c8729f src/natten/backends/flex.py:340-412",
    licence="MIT",
    published="gna-18-24-24-16-8-8_block-2-8-8",
)
