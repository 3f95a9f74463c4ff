"""Iwin: windows whose tokens lie evenly over the video; each token attends its own window.

A window holds the tokens whose places leave the same remainders. What the paper's depthwise
convolution adds from neighbours, local windows in every second layer do here: where a side's square
reaches over its axis, one window of each kind joins any two tokens.
"""

from functools import lru_cache
from types import SimpleNamespace

import torch
from torch import Tensor

from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.head_orders import grouped_order, mask_of_groups
from nabla_attn.core.token_orders import tile_of_tokens, window_of_tokens
from nabla_attn.methods.contract import Method, Selection, State
from nabla_attn.methods.parameters import sides, word


def _select(
    q: Tensor, k: Tensor, grid: TokenGrid, params: SimpleNamespace, state: State
) -> Selection:
    is_local = params.layers == "alternate" and state.layer % 2 == 1
    return _windows(grid, params.window, is_local, q.device)


@lru_cache(maxsize=32)
def _windows(
    grid: TokenGrid, window: tuple[int, int, int], is_local: bool, device: torch.device
) -> Selection:
    windows, count = [], 0
    for frames in grid.segment_frames:
        sizes = (frames, grid.height, grid.width)
        found = (tile_of_tokens if is_local else window_of_tokens)(sizes, window) + count
        count = int(found.max()) + 1
        windows.append(found)
    with torch.inference_mode(False), torch.no_grad():
        groups = torch.cat(windows).to(device)[None, None]
        order, of_block = grouped_order(groups, count, grid.block.tokens)
        own = torch.eye(count, dtype=torch.bool, device=device)[None, None]
        return Selection(mask_of_groups(own, of_block, of_block), order, order)


METHOD = Method(
    name="iwin",
    title="interleaved windows",
    select=_select,
    parameters=(
        sides("window", example=(1, 8, 8)),
        word("layers", ("alternate", "all"), default="alternate"),
    ),
    kind="static",
    exactness="reconstructed",
    ours="windows along time; remainders of unequal size where a window does not divide an axis; "
    "local windows in odd layers in place of the convolution (`all` has none, and on sizes that "
    "divide equals the code's attention)",
    paper="arXiv:2507.18405",
    code="Cominder/Iwin-Transformer@6f40b98 classification/models/iwin_transformer.py",
    licence="MIT",
    published="iwin-1-8-8-all",
    needs=("layer",),
    takes_order=False,
)
