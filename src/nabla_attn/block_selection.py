"""Queries and keys -> block map: the engine that runs the methods of an algorithm.

Static methods are joined first, then those that look at tokens in their own way, then pooled ones:
pool, score and select, in panels of bounded memory.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from functools import lru_cache
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from nabla_attn import methods
from nabla_attn.config import SparseConfig
from nabla_attn.core.block_map import (
    BlockMap,
    Treatment,
    block_map_of,
    map_in_head_orders,
    valid_slots,
    whole_block_map,
)
from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.order import TokenLayout, block_order, has_whole_rows, to_blocks
from nabla_attn.core.scores import (
    RASTER_AXES,
    multiply_blocks,
    pool_blocks,
    pool_raster,
    score_blocks,
    split_raster,
    take_and_pool,
)
from nabla_attn.core.select import NUM_PASSES
from nabla_attn.core.tiles import mean_of_pairs, share_pairs_
from nabla_attn.core.window import build_first_frame_map, build_segment_map
from nabla_attn.fusion import fused, take_any_length
from nabla_attn.methods import MethodUse, Moment, Selection, State
from nabla_attn.shapes import Bool, Float

# Scores of one panel: 128 MB in fp32, so that a few temporaries stay far below 2 GB.
PANEL_SCORES = 2**25
# Queries or keys pooled at once, in numbers: 256 MB in fp32, into which a CPU copies them.
PANEL_TOKENS = 2**26


@torch.no_grad()
def select_blocks(
    q: Float[Tensor, "batch heads slots dim"],
    k: Float[Tensor, "batch heads slots dim"],
    layout: TokenLayout,
    config: SparseConfig,
    *,
    scale: float | None = None,
    text_valid: Bool[Tensor, "batch text"] | None = None,
    measure: bool = False,
    is_raster: bool = False,
    v: Float[Tensor, "batch heads slots dim"] | None = None,
    moment: Moment | None = None,
    memory: dict[str, Any] | None = None,
    tables: Mapping[str, Mapping[str, Any]] | None = None,
    parts: Mapping[str, Mapping[str, Tensor]] | None = None,
    hidden: Float[Tensor, "batch slots width"] | None = None,
    q_means: Float[Tensor, "batch heads blocks dim"] | None = None,
    k_means: Float[Tensor, "batch heads blocks dim"] | None = None,
) -> BlockMap:
    """Let the methods of an algorithm select blocks of queries and keys.

    Memory beside the map is bounded for static and pooled methods, whatever the number of heads and
    tokens. Everything is computed in fp32, autocast or not: a rounded map is a different result.

    Args:
        q: Queries in block order, any floating dtype.
        k: Keys in block order.
        layout: Where the tokens are.
        config: Which blocks are kept.
        scale: Factor on q.k; None is 1/sqrt(dim).
        text_valid: False where a sample's text is padding.
        measure: Whether to fill `BlockMap.kept_mass`, which for queries that share the union of
            their maps is the mass before the union.
        is_raster: Whether q and k are in raster order; a few heads at a time are reordered.
        v: Values, like q, for methods that need them.
        moment: Step and layer, for methods that depend on them; None is not known.
        memory: What methods keep between steps, by their names; None keeps nothing.
        tables: What calibration found, by the method's name.
        parts: Parameters of trained parts, by the method's name and their own.
        hidden: Hidden states of the video's tokens in block order, for methods with such parts.
        q_means: Means of the video's blocks of q, where they are known (`reorder_and_pool`).
        k_means: The same of k.

    Raises:
        ValueError: A method lacks something that it needs, or two methods do not go together.
    """
    grid = layout.grid
    shape = (*q.shape[:2], grid.num_blocks, grid.num_blocks)
    if 0 in shape:
        empty = torch.ones(shape, dtype=torch.bool, device=q.device)
        return block_map_of(empty, layout, text_valid, kept_mass=empty.new_empty(shape[:2]).float())
    state = State(
        **vars(moment or Moment()),
        scale=1 / sqrt(q.shape[-1]) if scale is None else scale,
        counts=block_order(layout, q.device).counts[: grid.num_blocks],
        allowed=_same_clip(layout, q.device),
    )
    check_needs(config, grid, v=v, tables=tables)
    always = _always_kept(layout, config, state, q.device)
    pooled = _uses_of(config, "pooled")
    chosen = None
    if others := _uses_of(config, "other"):
        if is_raster:
            q, k = to_blocks(q, layout), to_blocks(k, layout)
            v = None if v is None else to_blocks(v, layout)
        video = slice(grid.num_slots)
        valid = valid_slots(layout, q.shape[0], text_valid, q.device)
        state = replace(state, v=None if v is None else v[:, :, video], valid=valid)
        state = replace(state, hidden=hidden)
        given = (memory, tables or {}, parts or {})
        chosen = _select_each(others, q[:, :, video], k[:, :, video], grid, state, *given)
        if chosen.q_order is not None:
            return _map_in_head_orders(chosen, config, layout, text_valid, shape[:2])
        always = _joined(always, chosen.mask, shape)
        is_raster = False
    if not pooled and not measure:
        kept = _share_pairs(always, config, state, shape)
        return _treated(block_map_of(kept.expand(shape), layout, text_valid), chosen)
    # The strips of text stay as they are: kept.
    whole = torch.ones(
        (*shape[:2], layout.num_blocks, layout.num_blocks), dtype=torch.bool, device=q.device
    )
    kept = whole[:, :, : grid.num_blocks, : grid.num_blocks].flatten(0, 1)
    if q_means is None or k_means is None:
        q_means, k_means = (pool_video(x, layout, is_raster=is_raster) for x in (q, k))
    q, k = q_means.flatten(0, 1), k_means.flatten(0, 1)
    mass = _select_pooled_(kept, q, k, grid, config, always, state).view(shape[:2])
    found = whole_block_map(whole, layout, text_valid, kept_mass=mass if measure else None)
    return _treated(found, chosen)


def check_needs(
    config: SparseConfig,
    grid: TokenGrid,
    *,
    v: Tensor | None = None,
    tables: Mapping[str, Any] | None = None,
) -> None:
    """Raise ValueError where a method lacks values or its table, or does not take packed clips."""
    for use in config.uses:
        method = methods.find(use.name)
        if "values" in method.needs and v is None:
            raise ValueError(f"{use} chooses by values too: pass v=, or use nabla_attention.")
        if grid.segments is not None and not method.packs:
            raise ValueError(f"{use} takes one clip: got {len(grid.segments)} packed ones.")
        if "table" in method.needs and use.name not in (tables or {}):
            raise ValueError(methods.why_no_table(use.name))


def _uses_of(config: SparseConfig, kind: str) -> list[MethodUse]:
    """The methods that are "static", "pooled", or "other"."""
    found = []
    for use in config.uses:
        method = methods.find(use.name)
        is_static, is_pooled = method.keep is not None, method.choose is not None
        if kind == ("static" if is_static else "pooled" if is_pooled else "other"):
            found.append(use)
    return found


def _select_each(
    uses: list[MethodUse],
    q: Tensor,
    k: Tensor,
    grid: TokenGrid,
    state: State,
    memory: dict[str, Any] | None,
    tables: Mapping[str, Mapping[str, Any]],
    parts: Mapping[str, Mapping[str, Tensor]],
) -> Selection:
    """What methods of their own kind select together."""
    found: Selection | None = None
    for use in uses:
        method = methods.find(use.name)
        mine = replace(
            state,
            v=state.v if "values" in method.needs else None,
            memory={} if memory is None else memory.setdefault(str(use), {}),
            table=tables.get(use.name),
            parts=parts.get(use.name),
            hidden=state.hidden if "hidden" in method.needs else None,
        )
        with torch.autocast(q.device.type, enabled=False):
            selection = method.select(q, k, grid, method.params(use.values), mine)
        if isinstance(selection, Tensor):
            selection = Selection(selection)
        if found is None:
            found = selection
            continue
        if any(x is not None for each in (found, selection) for x in _fields_of(each)[1:]):
            raise ValueError(
                f"{uses[0]} and {use} cannot be joined: one of them reorders tokens or changes "
                "the output. Use one of the two."
            )
        found = Selection(found.mask | selection.mask)
    assert found is not None
    return found


def _fields_of(selection: Selection) -> tuple[Any, ...]:
    """The fields of a selection, tensors as they are."""
    return tuple(getattr(selection, each.name) for each in fields(selection))


def _joined(always: Tensor | None, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[batch * heads, q_blocks, kv_blocks]: the union of both."""
    mask = mask.expand(shape).flatten(0, 1)
    return mask if always is None else mask | always


def _treated(block_map: BlockMap, chosen: Selection | None) -> BlockMap:
    if chosen is None or (chosen.prepare is None and chosen.finish is None):
        return block_map
    return replace(block_map, treatment=Treatment(chosen.prepare, chosen.finish))


def _share_pairs(
    kept: Tensor | None, config: SparseConfig, state: State, shape: tuple[int, ...]
) -> Bool[Tensor, "batch heads q_blocks kv_blocks"]:
    """What is kept without a score; all blocks of the clip where no method says otherwise."""
    count = shape[-1]
    if kept is None:
        kept = torch.ones(count, count, dtype=torch.bool, device=state.counts.device)
    else:
        # A window's map is cached, and a caller may write in what it is given.
        kept = kept.clone()
    kept = kept.view(-1, count, count)
    if config.pair_queries is not None:
        share_pairs_(kept)
    kept = kept if state.allowed is None else kept & state.allowed
    return kept[None] if len(kept) == 1 else kept.view(shape)


def _map_in_head_orders(
    chosen: Selection,
    config: SparseConfig,
    layout: TokenLayout,
    text_valid: Tensor | None,
    shape: tuple[int, int],
) -> BlockMap:
    """The map of a selection whose heads have orders of their own."""
    if len(config.uses) > 1 or config.keep_first_frame or config.pair_queries or config.tail:
        raise ValueError(
            f"{config}: {config.uses[0]} brings tokens of each head in an order of its own, with "
            "which no window, pairing, first frame or tail can be joined. Use it alone."
        )
    assert chosen.q_order is not None and chosen.kv_order is not None
    found = map_in_head_orders(
        chosen.mask,
        chosen.q_order,
        chosen.kv_order,
        layout,
        text_valid,
        shape,
        text_keys=chosen.text_keys,
    )
    return _treated(found, chosen)


def _select_pooled_(
    kept: Bool[Tensor, "heads q_blocks kv_blocks"],
    q_pooled: Float[Tensor, "heads q_blocks dim"],
    k_pooled: Float[Tensor, "heads kv_blocks dim"],
    grid: TokenGrid,
    config: SparseConfig,
    always: Bool[Tensor, "*heads q_blocks kv_blocks"] | None,
    state: State,
) -> Float[Tensor, " heads"]:
    """Fill `kept`; returns the mass that each head's rows hold, their mean."""
    if config.pair_queries == "pool":
        q_pooled = mean_of_pairs(q_pooled, state.counts, state.allowed)
    uses = tuple(_uses_of(config, "pooled"))
    chooses = tuple(methods.find(use.name).choose for use in uses)
    targets = tuple(_targets(use, grid, q_pooled.dtype, kept.device) for use in uses)
    if not config.uses:
        always = torch.ones_like(kept[0])
    mass = _select_panels_(kept, q_pooled, k_pooled, targets, chooses, always, state)
    if config.pair_queries is not None:
        share_pairs_(kept)
        if state.allowed is not None:
            kept &= state.allowed
    return mass.mean(dim=1)


def reorder_and_pool(
    *inputs: Float[Tensor, "batch heads tokens dim"], layout: TokenLayout
) -> tuple[list[Tensor], list[Tensor]]:
    """Queries and keys in block order, and the means of the video's blocks.

    A GPU does both in one pass over the tokens where all heads of a token lie together and no
    gradient is wanted; elsewhere there are no means.
    """
    blocks, means = [], []
    order, num_video = block_order(layout, inputs[0].device), layout.grid.num_blocks
    for x in inputs:
        run = fused(take_and_pool, x.numel(), x.device)
        needs_grad = torch.is_grad_enabled() and x.requires_grad
        if run is take_and_pool or needs_grad or not has_whole_rows(x):
            return [to_blocks(x, layout) for x in inputs], []
        slots = order.to_blocks.view_as(order.is_filled)
        taken, pooled = run(x.transpose(1, 2), slots, order.is_filled, order.counts)
        blocks.append(taken.flatten(1, 2).transpose(1, 2))
        means.append(pooled[:, :num_video].transpose(1, 2))
    return blocks, means


def pool_video(
    x: Float[Tensor, "batch heads slots dim"], layout: TokenLayout, *, is_raster: bool = False
) -> Float[Tensor, "batch heads blocks dim"]:
    """Means of the video's blocks, text left out, in fp32; a few heads at a time.

    Args:
        x: Queries or keys in block order.
        layout: Where the tokens are.
        is_raster: x is in raster order.
    """
    grid, counts = layout.grid, block_order(layout, x.device).counts[: layout.grid.num_blocks]
    is_in_boxes = grid.order is None and not layout.is_ragged and not layout.num_text
    if is_raster and is_in_boxes:
        run = fused(pool_raster, x.numel(), x.device)
        if run is not pool_raster:
            samples = [split_raster(sample, grid) for sample in x]
            take_any_length(*samples, axes=RASTER_AXES)
            return torch.stack([run(sample) for sample in samples])
    run = fused(pool_blocks, x.numel(), x.device, dynamic=True)

    def pool(part: Tensor) -> Tensor:
        part = to_blocks(part, layout) if is_raster else part
        # One sample at a time: a batch of 1 and one of 2 would be compiled apart.
        return torch.stack([run(sample[:, : grid.num_slots], counts) for sample in part])

    heads = max(1, PANEL_TOKENS // (x.shape[0] * x.shape[2] * x.shape[3]))
    return torch.cat([pool(part) for part in x.split(heads, dim=1)], dim=1)


@lru_cache(maxsize=64)
def _targets(
    use: MethodUse, grid: TokenGrid, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "q_blocks 1"]:
    """What each row must reach under a pooled method; cached."""
    method = methods.find(use.name)
    assert method.target is not None
    # What is made under inference_mode could not be used outside, and a GPU's host would wait.
    with torch.inference_mode(False), torch.no_grad():
        values = method.target(grid, method.params(use.values))
        return torch.tensor(values, dtype=dtype)[:, None].to(device)


def _always_kept(
    layout: TokenLayout, config: SparseConfig, state: State, device: torch.device
) -> Bool[Tensor, "*heads q_blocks kv_blocks"] | None:
    """Blocks that are kept whatever the tokens hold, or None."""
    always = None
    for use in _uses_of(config, "static"):
        method = methods.find(use.name)
        assert method.keep is not None
        kept = method.keep(layout.grid, method.params(use.values), state, device)
        always = kept if always is None else always | kept
    if config.keep_first_frame:
        first = build_first_frame_map(layout.grid, device)
        always = first.expand(first.numel(), -1) if always is None else always | first
    return always


def _same_clip(
    layout: TokenLayout, device: torch.device
) -> Bool[Tensor, "q_blocks kv_blocks"] | None:
    """Blocks of the same packed clip; None where there is one clip."""
    return None if layout.grid.segments is None else build_segment_map(layout.grid, device)


def _panels(num_heads: int, num_rows: int, num_columns: int) -> Iterator[tuple[slice, slice]]:
    """Slices of heads and rows of at most PANEL_SCORES scores, whole heads where they fit."""
    rows = list(_equal_slices(num_rows, PANEL_SCORES // num_columns))
    per_panel = PANEL_SCORES // (num_rows * num_columns) if len(rows) == 1 else 1
    for head in _equal_slices(num_heads, per_panel):
        for row in rows:
            yield head, row


def _equal_slices(total: int, most: int) -> Iterator[slice]:
    """Slices of one length, at most `most`; the last may overlap, so that one shape compiles."""
    count = -(-total // max(1, min(total, most)))
    length = -(-total // count)
    for index in range(count):
        start = min(index * length, total - length)
        yield slice(start, start + length)


def _select_panels_(
    kept: Tensor,
    q_pooled: Tensor,
    k_pooled: Tensor,
    targets: tuple[Tensor, ...],
    chooses: tuple[Any, ...],
    always: Tensor | None,
    state: State,
) -> Tensor:
    """Fill `kept` panel by panel; returns the mass that each row holds."""
    mass = q_pooled.new_empty(q_pooled.shape[:2])
    run = fused(_select_panel, kept.numel() * NUM_PASSES, kept.device)
    # A GPU's kernel takes a softmax on its way; a CPU's would round it in another way.
    takes_scores = run is not _select_panel and kept.device.type == "cuda"
    score = multiply_blocks if takes_scores else score_blocks
    # A compiled kernel on a CPU reads and writes bytes ten times as fast as bools.
    always = None if always is None else always.byte()
    for heads, rows in _panels(*kept.shape):
        allowed = None if state.allowed is None else state.allowed[rows]
        fixed = always if always is None or always.dim() == 2 else always[heads]
        fixed = None if fixed is None else fixed[..., rows, :]
        scores = score(q_pooled[heads, rows], k_pooled[heads], scale=state.scale, allowed=allowed)
        if run is not _select_panel:
            take_any_length(scores)
        mine = tuple(target[rows] for target in targets)
        kept_bytes, mass[heads, rows] = run(scores, mine, fixed, allowed, chooses, takes_scores)
        kept[heads, rows] = kept_bytes.view(torch.bool)
    return mass


def _select_panel(
    probs: Tensor,
    targets: tuple[Tensor, ...],
    fixed: Tensor | None,
    allowed: Tensor | None,
    chooses: tuple[Any, ...],
    takes_scores: bool,
) -> tuple[Tensor, Tensor]:
    """Kept blocks of some rows of some heads, as bytes, and the probability that they hold."""
    probs = probs.softmax(dim=-1) if takes_scores else probs
    # One axis for all rows of all heads: a compiler then loops over it once.
    rows = probs.flatten(0, 1)
    kept = torch.zeros_like(probs, dtype=torch.bool)
    for choose, target in zip(chooses, targets, strict=True):
        kept = kept | choose(rows, target.repeat(len(probs), 1)).view_as(probs)
    kept = kept if fixed is None else kept | (fixed > 0)
    kept = kept if allowed is None else kept & allowed
    kept_bytes = torch.where(kept, 1.0, 0.0).byte()
    return kept_bytes, (probs * kept_bytes).sum(dim=-1)
