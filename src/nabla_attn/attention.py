"""NABLA attention, the whole algorithm in one screen (arXiv:2507.13546, Algorithm 1).

tokens -> blocks -> scores -> block map -> backend -> output
"""

import torch.nn.functional as F
from torch import Tensor

from nabla_attn import backends
from nabla_attn.config import SparseConfig, as_config
from nabla_attn.core.block_map import BlockMap
from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.order import TokenLayout, check_tokens, to_blocks, to_raster
from nabla_attn.mapping import map_blocks
from nabla_attn.shapes import Bool, Float


def nabla_attention(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch heads tokens dim"],
    v: Float[Tensor, "batch heads tokens dim"],
    grid: TokenGrid,
    config: SparseConfig | str,
    *,
    backend: str = "auto",
    scale: float | None = None,
    text_before: int = 0,
    text_after: int = 0,
    text_valid: Bool[Tensor, "batch text"] | None = None,
    keep_first_frame: bool = False,
    pair_queries: str | None = None,
) -> Float[Tensor, "batch heads tokens dim"]:
    """Block-sparse attention over a video's tokens; raster order in and out, differentiable.

    Every sample and head gets its own map. Gradients flow through the attention output only.

    Args:
        q: queries, rotary embedding applied; text tokens may stand before or after the video's.
        k: keys, like q.
        v: values.
        grid: the video's token grid.
        config: which blocks are kept; a string such as "nabla-0.7" is parsed.
        backend: "auto" or one of `backends.NAMES`.
        scale: factor on q.k, in the map too; None is 1/sqrt(dim).
        text_before: text tokens in front of the video; text attends and is attended by all.
        text_after: text tokens behind it.
        text_valid: False where a sample's text is padding, which is never attended.
        keep_first_frame: every block attends the first frame of its clip.
        pair_queries: "union" or "pool": two neighbouring query blocks share one map, which suits
            taller GPU tiles and changes the result; None leaves every block its own.

    Raises:
        ValueError: shapes do not fit the grid, or an unknown backend.
        RuntimeError: the backend asked for cannot run here; says why.
    """
    config = as_config(config)
    grid = grid.with_block(config.block)
    layout = TokenLayout(grid, text_before, text_after)
    attend = backends.resolve(backend, q, k, v, block_tokens=grid.block.tokens)
    check_tokens(q, layout)
    is_plain = config.is_dense and grid.segments is None and text_valid is None
    if 0 in q.shape[:2] or (backend == "auto" and is_plain):
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    q_blocks, k_blocks, v_blocks = (to_blocks(x, layout) for x in (q, k, v))
    block_map = map_blocks(
        q_blocks,
        k_blocks,
        layout,
        config,
        scale=scale,
        text_valid=text_valid,
        keep_first_frame=keep_first_frame,
        pair_queries=pair_queries,
    )
    out = attend(q_blocks, k_blocks, v_blocks, block_map, scale=scale)
    return to_raster(out, layout)


def build_block_map(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch heads tokens dim"],
    grid: TokenGrid,
    config: SparseConfig | str,
    *,
    scale: float | None = None,
    text_before: int = 0,
    text_after: int = 0,
    text_valid: Bool[Tensor, "batch text"] | None = None,
    keep_first_frame: bool = False,
    pair_queries: str | None = None,
) -> BlockMap:
    """The map that `nabla_attention` would use for these queries and keys; same arguments.

    An empty batch has an empty map.

    Raises:
        ValueError: shapes do not fit each other or the grid.
    """
    config = as_config(config)
    layout = TokenLayout(grid.with_block(config.block), text_before, text_after)
    backends.check_inputs(q=q, k=k)
    check_tokens(q, layout)
    return map_blocks(
        q,
        k,
        layout,
        config,
        scale=scale,
        text_valid=text_valid,
        keep_first_frame=keep_first_frame,
        pair_queries=pair_queries,
        is_raster=True,
    )
