"""NABLA attention, the whole algorithm in one screen (arXiv:2507.13546, Algorithm 1).

tokens -> blocks -> scores -> block map (-> tail) -> backend -> output

`nabla_attention` and the attention of every model (`models/operator.py`) are calls of `attend`.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nabla_attn import backends
from nabla_attn.block_selection import reorder_and_pool, select_blocks
from nabla_attn.config import SparseConfig, as_config
from nabla_attn.core.block_map import BlockMap, HeadOrder, Treatment
from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.order import (
    TokenLayout,
    check_tokens,
    has_whole_rows,
    text_entries,
    to_blocks,
    to_raster,
    write_raster,
)
from nabla_attn.core.tail import Tail, build_tail, tail_density
from nabla_attn.cost.memory import free_bytes, in_gib, memory_is_forced
from nabla_attn.shapes import Bool, Float

# Index tables of the pairs of blocks of all samples, four bytes each, that a GPU holds at once.
MAX_TABLE_BYTES = 300_000_000
# From so many copies of keys and values on, the memory that they take is looked at beforehand.
FEW_REPEATS = 4


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
) -> Float[Tensor, "batch heads tokens dim"]:
    """Block-sparse attention over a video's tokens; raster order in and out, differentiable.

    Every sample and head gets its own map. Gradients flow through the attention output only. Under
    autocast the products run in its dtype, as those of `scaled_dot_product_attention` do; the map
    is computed from q and k as they come.

    Args:
        q: Queries, rotary embedding applied; text tokens may stand before or after the video's.
        k: Keys, like q.
        v: Values.
        grid: The video's token grid.
        config: Which blocks are kept; a string such as "nabla-0.7" is parsed.
        backend: "auto" or one of `backends.NAMES`.
        scale: Factor on q.k, in the map too; None is 1/sqrt(dim).
        text_before: Number of text tokens in front of the video. Text attends all tokens and is
            attended by all.
        text_after: Number of text tokens behind it.
        text_valid: False where a sample's text is padding, which is never attended.

    Raises:
        ValueError: Shapes do not fit the grid, or the backend is unknown.
        RuntimeError: The backend that was asked for cannot run here; the message says why.
    """
    layout = TokenLayout(grid, text_before, text_after)
    options = {"backend": backend, "scale": scale, "text_valid": text_valid}
    return attend(q, k, v, layout, as_config(config), **options)[0]  # type: ignore[arg-type]


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
    v: Float[Tensor, "batch heads tokens dim"] | None = None,
) -> BlockMap:
    """The map that `nabla_attention` would use for these queries and keys; same arguments.

    An empty batch has an empty map. Values are for methods that choose by them too.

    Raises:
        ValueError: Shapes do not fit each other or the grid, or a method needs the values.
    """
    config = as_config(config)
    layout = TokenLayout(grid.with_block(config.block, config.order), text_before, text_after)
    backends.check_inputs(q=q, k=k)
    check_tokens(q, layout)
    return select_blocks(
        q, k, layout, config, scale=scale, text_valid=text_valid, is_raster=True, v=v
    )


def attend(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch heads tokens dim"],
    v: Float[Tensor, "batch heads tokens dim"],
    layout: TokenLayout,
    config: SparseConfig,
    *,
    backend: str = "auto",
    scale: float | None = None,
    text_valid: Bool[Tensor, "batch text_or_tokens"] | None = None,
    measure: bool = False,
    dtype: torch.dtype | None = None,
    is_block_order: bool = False,
    parts: Mapping[str, Mapping[str, Tensor]] | None = None,
    hidden: Float[Tensor, "batch video_tokens width"] | None = None,
    select: Callable[..., BlockMap] = select_blocks,
) -> tuple[Float[Tensor, "batch heads tokens dim"], BlockMap | None]:
    """Attention of one call, and the map that it used; None where it was dense.

    A dense algorithm is left to `scaled_dot_product_attention` when the backend is "auto" and no
    clips are packed. An explicit backend computes it over a map that keeps everything.

    Args:
        q: Queries in raster order.
        k: Keys, like q.
        v: Values, like q.
        layout: Where the video's tokens and the text's are.
        config: Which blocks are kept, and how large they are.
        backend: "auto" or one of `backends.NAMES`.
        scale: Factor on q.k; None is 1/sqrt(dim).
        text_valid: False where a sample's text is padding; of all tokens only those of the text
            count.
        measure: Whether the map says which probability mass it keeps.
        dtype: Type of the products and of the output; None is autocast's where it is on, or else
            that of q, k and v.
        is_block_order: Whether tokens come in block order and the output leaves in it.
        parts: Parameters of methods' trained parts, by the method's name and their own.
        hidden: Hidden states of the video's tokens, in the order of q, for methods with such parts.
        select: What chooses the blocks, called as `select_blocks` is; a cache of maps, for example.

    Raises:
        ValueError: Shapes do not fit the layout, or the backend is unknown.
        RuntimeError: The backend cannot run here; the message says why.
    """
    layout = replace(layout, grid=layout.grid.with_block(config.block, config.order))
    text_valid = None if text_valid is None else text_entries(text_valid, layout)
    dtype = autocast_dtype(q.device) if dtype is None else dtype
    # The map is computed from what came: rounded, it would be another one.
    uncast = [] if dtype in (None, q.dtype) else [q, k]
    q, k, v = (_cast(x, dtype) for x in (q, k, v))
    block_tokens = layout.grid.block.tokens
    run = backends.resolve(
        backend,
        q,
        k,
        v,
        block_tokens=block_tokens,
        tail=config.tail,
        is_text_padded=text_valid is not None,
    )
    check_tokens(q, layout)
    _check_gradients(config, q, k, v)
    is_plain = config.is_dense and layout.grid.segments is None and backend == "auto"
    if is_plain or 0 in q.shape[:2]:
        return _attend_densely(q, k, v, layout, text_valid, scale), None
    options: dict[str, Any] = {"scale": scale, "text_valid": text_valid, "measure": measure}
    if not is_block_order:
        v, *uncast = (to_blocks(x, layout) for x in (v, *uncast))
        (q, k), means = reorder_and_pool(q, k, layout=layout)
        if means and not uncast:
            options |= {"q_means": means[0], "k_means": means[1]}
    if "values" in config.needs:
        options["v"] = v
    if parts:
        options["parts"] = parts
    if hidden is not None:
        hidden = _cast(hidden, dtype)[:, None]
        hidden = hidden if is_block_order else to_blocks(hidden, TokenLayout(layout.grid))
        options["hidden"] = hidden[:, 0]
    block_map = select(*(uncast or (q, k)), layout, config, **options)
    tail = None
    if config.tail is not None:
        with torch.autocast(q.device.type, enabled=False):
            tail = build_tail(k, v, block_map, layout, config.tail)
        if measure:
            block_map = replace(block_map, tail_density=tail_density(tail, block_map))
    if not is_block_order and tail is None and _is_large(block_map, q, k, v):
        return _attend_samples(run, q, k, v, block_map, layout, scale), block_map
    out = _attend_blocks(run, q, k, v, block_map, layout, scale=scale, tail=tail)
    # Where no gradient needs them, their memory serves the output.
    del q, k, v
    return (out if is_block_order else to_raster(out, layout)), block_map


def _attend_blocks(
    run: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: BlockMap,
    layout: TokenLayout,
    *,
    scale: float | None,
    tail: Tail | None,
) -> Tensor:
    """A backend's output in block order, with what a method does beside choosing blocks."""
    treatment = block_map.treatment or Treatment()
    if block_map.q_order is not None:
        q, k, v = (to_raster(x, layout) for x in (q, k, v))
        _check_copies(k, block_map.kv_order)
        q = _in_order(q, block_map.q_order)
        k, v = (_in_order(x, block_map.kv_order) for x in (k, v))
    without_autocast = torch.autocast(q.device.type, enabled=False)
    if treatment.prepare is not None:
        with without_autocast:
            q, k, v = treatment.prepare(q, k, v)
    if block_map.q_order is None:
        out = run(q, k, v, block_map, scale=scale, tail=tail)
    else:
        # Heads whose tokens are laid out differently are samples of one head.
        folded = (x.flatten(0, 1)[:, None] for x in (q, k, v))
        out = run(*folded, block_map.folded, scale=scale, tail=None).view_as(q)
    if treatment.finish is not None:
        with without_autocast:
            out = treatment.finish(out, q, k, v)
    if block_map.q_order is not None:
        slots = block_map.q_order.slots
        out = to_blocks(out.gather(2, slots[..., None].expand(-1, -1, -1, out.shape[-1])), layout)
    return out


def _is_large(block_map: BlockMap, *inputs: Tensor) -> bool:
    """Whether samples are attended one after another, so that a GPU holds the tables of one."""
    is_plain = block_map.q_order is None and block_map.treatment is None
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    is_gpu = inputs[0].device.type == "cuda" and all(has_whole_rows(x) for x in inputs)
    return is_gpu and is_plain and not needs_grad and 4 * block_map.mask.numel() > MAX_TABLE_BYTES


def _attend_samples(
    run: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: BlockMap,
    layout: TokenLayout,
    scale: float | None,
) -> Tensor:
    """The output in raster order, written a sample at a time."""
    batch, heads, _, dim = q.shape
    out = q.new_empty(batch, layout.num_tokens, heads, dim).transpose(1, 2)
    for index in range(batch):
        mine = (x[index : index + 1] for x in (q, k, v))
        part = run(*mine, block_map.sample(index), scale=scale, tail=None)
        write_raster(out[index : index + 1], part, layout)
        del part
    return out


def _in_order(x: Tensor, order: HeadOrder | None) -> Tensor:
    """Tokens [batch, heads, tokens, dim] in the slots of an order; empty ones are zero."""
    assert order is not None
    tokens = order.tokens[..., None]
    taken = x.gather(2, tokens.clamp_min(0).expand(-1, -1, -1, x.shape[-1]))
    return taken.masked_fill_(tokens < 0, 0)


def _check_copies(k: Tensor, order: HeadOrder | None) -> None:
    """Raise ValueError where an order repeats keys and values beyond the memory that is free."""
    assert order is not None
    repeats = order.tokens.shape[-1] / k.shape[2]
    needed = 2 * k.shape[0] * k.shape[1] * order.tokens.shape[-1] * k.shape[3] * k.element_size()
    if repeats < FEW_REPEATS or memory_is_forced():
        return
    if needed > (free := free_bytes(k.device)):
        raise ValueError(
            f"the method lays each key and value out {repeats:.0f} times, which takes "
            f"{in_gib(needed)} where {in_gib(free)} are free. Keep less, take fewer "
            "clusters, or whole blocks (chipmunk-unit=blocks)."
        )


def _check_gradients(config: SparseConfig, *inputs: Tensor) -> None:
    """Raise ValueError where gradients are wanted of a method that has none."""
    if config.is_trainable or not torch.is_grad_enabled():
        return
    if any(x.requires_grad for x in inputs):
        raise ValueError(
            f"{config} is for inference: gradients would not be those of its output. Use "
            "torch.no_grad(), or train with another method such as nabla-0.7."
        )


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The type that autocast gives to attention on a device; None where it is off."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    # Autocast leaves float64 alone.
    return x if dtype is None or x.dtype == torch.float64 else x.to(dtype)


def _attend_densely(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    text_valid: Tensor | None,
    scale: float | None,
) -> Tensor:
    mask = None
    if text_valid is not None:
        mask = text_valid.new_ones(len(text_valid), layout.num_tokens, dtype=torch.bool)
        mask[:, : layout.text_before] = text_valid[:, : layout.text_before]
        mask[:, layout.num_tokens - layout.text_after :] = text_valid[:, layout.text_before :]
        mask = mask[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
