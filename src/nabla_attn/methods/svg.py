"""SVG: each head attends a band of its tokens frame by frame, or of its tokens patch by patch.

Which of the two loses less is found on a few queries, whose exact output both are compared with.
"""

from functools import lru_cache
from math import sqrt
from types import SimpleNamespace

import torch
from torch import Tensor

from nabla_attn.core.block_map import HeadOrder
from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.head_orders import head_order
from nabla_attn.core.order import TokenLayout, to_raster, tokens_in_order
from nabla_attn.core.token_orders import parse_order
from nabla_attn.methods.contract import Method, Selection, State
from nabla_attn.methods.parameters import count, share, word

ORDERS = ("raster", "hwt")
"""Frame by frame (spatial heads), and patch by patch (temporal heads)."""


def _select(
    q: Tensor, k: Tensor, grid: TokenGrid, params: SimpleNamespace, state: State
) -> Selection:
    assert state.v is not None
    bands = _bands(grid, params.share, params.sink == "sink", q.device)
    orders = _orders(grid, q.device)
    video = tuple(to_raster(x, TokenLayout(grid)) for x in (q, k, state.v))
    losses = _losses(video, [x.slots[0, 0] for x in orders], bands, params.rows, state.scale)
    is_temporal = (losses[1] < losses[0])[..., None]
    chosen = HeadOrder(
        torch.where(is_temporal, orders[1].tokens, orders[0].tokens),
        torch.where(is_temporal, orders[1].slots, orders[0].slots),
    )
    return Selection(bands[None, None], chosen, chosen)


def _losses(
    video: tuple[Tensor, ...], slots: list[Tensor], bands: Tensor, num_rows: int, scale: float
) -> list[Tensor]:
    """The mean squared error of some queries' outputs [batch, heads] with each order's band."""
    q, k, v = video
    block = -(-int(slots[0].max() + 1) // len(bands))
    rows = torch.linspace(0, q.shape[2] - 1, min(num_rows, q.shape[2]), device=q.device).long()
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = (q[:, :, rows].to(dtype) * scale) @ k.to(dtype).transpose(-1, -2)
    exact = scores.softmax(dim=-1) @ v.to(dtype)
    found = []
    for each in slots:
        of_block = each // block
        kept = bands[of_block[rows]][:, of_block]
        outputs = scores.masked_fill(~kept, float("-inf")).softmax(dim=-1) @ v.to(dtype)
        found.append((outputs - exact).square().mean(dim=(-2, -1)))
    return found


@lru_cache(maxsize=32)
def _orders(grid: TokenGrid, device: torch.device) -> list[HeadOrder]:
    with torch.inference_mode(False), torch.no_grad():
        tokens = [tokens_in_order(grid, parse_order(name))[None, None] for name in ORDERS]
        return [head_order(each.to(device), grid.block.tokens) for each in tokens]


@lru_cache(maxsize=32)
def _bands(grid: TokenGrid, kept: float, has_sink: bool, device: torch.device) -> Tensor:
    """Pairs of blocks nearer than the width that keeps the share of all pairs [blocks, blocks]."""
    num_blocks = -(-grid.num_tokens // grid.block.tokens)
    # A band of width w keeps 1 - (1 - w / N)^2 of all pairs of N tokens.
    width = int(grid.num_tokens * (1 - sqrt(1 - kept)) * (1 + 1e-12)) // grid.block.tokens
    width = num_blocks if kept == 1 else max(1, width)
    with torch.inference_mode(False), torch.no_grad():
        at = torch.arange(num_blocks, device=device)
        near = (at[:, None] - at).abs() < width
        sink = at * grid.block.tokens < grid.height * grid.width
        return near | sink if has_sink else near


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
