"""VMoBA: each query attends the chunks whose mean key it likes; their shape is the layer's."""

from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from nabla_attn.core.block_map import HeadOrder
from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.head_orders import grouped_order
from nabla_attn.core.order import to_raster
from nabla_attn.core.select import SCOPES, select_by_normalised_share, select_top
from nabla_attn.methods.contract import Method, Selection, State
from nabla_attn.methods.parameters import count, share, sides, word


def _check(params: SimpleNamespace) -> None:
    if params.tubes[0] != 1:
        raise ValueError(
            f"vmoba: tubes go through all frames, so that their number along frames must be 1: got "
            f"{params.tubes}."
        )
    if params.top and params.scope == "column":
        raise ValueError(
            f"vmoba: a number of chunks goes with the scopes row, head and all: got top "
            f"{params.top} and scope column. Leave out top, or name another scope."
        )


def chunk_of_tokens(sizes: tuple[int, int, int], shapes: tuple[Any, ...], layer: int) -> Tensor:
    """The chunk of every token in raster order; layers take turns.

    Args:
        sizes: Frames, rows and columns of tokens.
        shapes: Number of runs in raster order, and of tubes and tiles along each axis.
        layer: 0 makes runs, 1 tubes through all frames, 2 tiles.
    """
    frames, height, width = sizes
    runs, tubes, tiles = shapes
    if layer == 0:
        tokens = torch.arange(frames * height * width)
        return tokens // -(-len(tokens) // runs)
    chunks = torch.zeros(1, dtype=torch.long)
    for size, number in zip(sizes, tubes if layer == 1 else tiles, strict=True):
        along = torch.arange(size) // -(-size // number)
        chunks = (chunks[:, None] * (int(along[-1]) + 1) + along).flatten()
    return chunks


def keep_chunks(gate: Tensor, own: Tensor, params: SimpleNamespace) -> Tensor:
    """Chunks [batch, heads, queries, chunks] that are attended, by a share of likes or a number."""
    if not params.top:
        return select_by_normalised_share(gate, params.threshold, own=own, scope=params.scope)
    keep_from = {"row": 3, "head": 2, "all": 1}[params.scope]
    pairs = gate.masked_fill(own, torch.finfo(gate.dtype).max).flatten(keep_from)
    number = params.top * pairs.shape[-1] // gate.shape[-1]
    kept = select_top(pairs, pairs.new_tensor(float(min(number, pairs.shape[-1]))))
    return kept.view(gate.shape) | own


def select(
    q: Tensor, k: Tensor, grid: TokenGrid, params: SimpleNamespace, state: State
) -> Selection:
    """Blocks of tokens of one chunk each; a block of queries attends what any of them likes."""
    shapes = (params.runs, params.tubes, params.tiles)
    own, order, of_block = _layout(grid, shapes, state.layer % 3, q.device)
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = (to_raster(x, grid).to(dtype) for x in (q, k))
    # Products with mean keys; unscaled, since likes are normalised.
    means = (own.to(dtype) / own.sum(dim=0)).T @ k
    tokens = order.tokens[0, 0].view(-1, grid.block.tokens)
    if params.gate == "pooled":
        is_token = (tokens >= 0).to(dtype)
        weights = is_token / is_token.sum(dim=1, keepdim=True)
        q = (q[:, :, tokens.clamp_min(0)] * weights[..., None]).sum(dim=3)
        kept = keep_chunks(q @ means.mT, one_hot(of_block, own.shape[1]).bool(), params)
    else:
        by_token = keep_chunks(q @ means.mT, own, params)
        # The last row stands for empty slots.
        kept = pad(by_token, (0, 0, 0, 1))[:, :, tokens].any(dim=3)
    return Selection(kept[..., of_block], order, order)


@lru_cache(maxsize=64)
def _layout(
    grid: TokenGrid, shapes: tuple[Any, ...], layer: int, device: torch.device
) -> tuple[Tensor, HeadOrder, Tensor]:
    """The chunk of every token as a mask, blocks of tokens of one chunk, and theirs."""
    sizes = (grid.frames, grid.height, grid.width)
    with torch.inference_mode(False), torch.no_grad():
        chunks = chunk_of_tokens(sizes, shapes, layer).to(device)
        number = int(chunks.max()) + 1
        order, of_block = grouped_order(chunks[None, None], number, grid.block.tokens)
        return one_hot(chunks, number).bool(), order, of_block[0, 0]


METHOD = Method(
    select=select,
    name="vmoba",
    title="chunks by the product of a query and their mean key, shaped by the layer",
    parameters=(
        share("threshold", "the share of normalised likes", example=0.25),
        word("scope", SCOPES, default="head"),
        count("top", least=0, default=0),
        word("gate", ("tokens", "pooled"), default="tokens"),
        count("runs", default=8),
        sides("tubes", default=(1, 6, 8)),
        sides("tiles", default=(3, 4, 6)),
    ),
    check=_check,
    exactness="code",
    ours="a block of queries attends what any of its tokens does, so that each token attends its "
    "chunks and some more (`pooled` asks for the block's mean query instead); how the published "
    "48 tubes and 72 tiles divide the axes; chunks of unequal size where they do not divide",
    paper="arXiv:2506.23858",
    code="KwaiVGI/VMoBA@4da72ff src/vmoba.py:53-730",
    published="vmoba-0.25",
    needs=("layer",),
    packs=False,
    takes_order=False,
)
