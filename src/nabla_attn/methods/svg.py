"""SVG: each head attends a band of its tokens frame by frame, or of its tokens patch by patch.

Which of the two loses less is found on a few queries, whose exact output both are compared with.
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from nabla_attn.core.block_map import HeadOrder
from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.head_orders import band_of_blocks, named_order
from nabla_attn.core.order import TokenLayout, to_raster
from nabla_attn.methods.contract import Method, Selection, State
from nabla_attn.methods.parameters import count, share, word

ORDERS = ("raster", "hwt")
"""Frame by frame (spatial heads), and patch by patch (temporal heads)."""


def _select(
    q: Tensor, k: Tensor, grid: TokenGrid, params: SimpleNamespace, state: State
) -> Selection:
    assert state.v is not None
    block = grid.block.tokens
    bands = band_of_blocks(grid.num_tokens, block, params.share, q.device)
    if params.sink == "sink":
        first = torch.arange(len(bands), device=q.device) * block < grid.height * grid.width
        bands = bands | first
    orders = [named_order(name, grid, q.device) for name in ORDERS]
    video = tuple(to_raster(x, TokenLayout(grid)) for x in (q, k, state.v))
    of_block = [order.slots[0, 0] // block for order in orders]
    losses = _losses(video, of_block, bands, params.rows, state.scale)
    is_temporal = (losses[1] < losses[0])[..., None]
    chosen = HeadOrder(
        torch.where(is_temporal, orders[1].tokens, orders[0].tokens),
        torch.where(is_temporal, orders[1].slots, orders[0].slots),
    )
    return Selection(bands[None, None], chosen, chosen)


def _losses(
    video: tuple[Tensor, ...], orders: list[Tensor], bands: Tensor, num_rows: int, scale: float
) -> list[Tensor]:
    """The mean squared error of some queries' outputs [batch, heads] with each order's band.

    `orders` has the block of every token in each.
    """
    q, k, v = video
    rows = torch.linspace(0, q.shape[2] - 1, min(num_rows, q.shape[2]), device=q.device).long()
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = (q[:, :, rows].to(dtype) * scale) @ k.to(dtype).transpose(-1, -2)
    exact = scores.softmax(dim=-1) @ v.to(dtype)
    found = []
    for of_block in orders:
        kept = bands[of_block[rows]][:, of_block]
        outputs = scores.masked_fill(~kept, float("-inf")).softmax(dim=-1) @ v.to(dtype)
        found.append((outputs - exact).square().mean(dim=(-2, -1)))
    return found


METHOD = Method(
    name="svg",
    title="spatial or temporal band, chosen for each head on sampled queries",
    select=_select,
    parameters=(
        share("share", "kept pairs of tokens in the band / all pairs", example=0.3),
        word("sink", ("plain", "sink"), default="plain"),
        count("rows", default=32),
    ),
    kind="pooled",
    exactness="reconstructed",
    ours="queries evenly spaced instead of random; the band in blocks of the grid instead of 128 "
    "tokens, and at least the diagonal; `sink` keeps as many first tokens of the order as a frame "
    "has, as the code for Wan does",
    paper="arXiv:2502.01776",
    code="svg-project/Sparse-VideoGen@5ce7b01 svg/models/cog/attention.py, svg/models/wan/utils.py",
    licence="Apache-2.0",
    published="svg-0.25-sink_block-2-8-8",
    needs=("values",),
    packs=False,
    takes_order=False,
)
