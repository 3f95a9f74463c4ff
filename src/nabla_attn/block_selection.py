"""Queries and keys -> block map: pool, score and select, in panels of bounded memory."""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from nabla_attn.config import SparseConfig
from nabla_attn.core.block_map import BlockMap, block_map_of, whole_block_map
from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.order import TokenLayout, block_order, to_blocks
from nabla_attn.core.scores import RASTER_AXES, pool_blocks, pool_raster, score_blocks, split_raster
from nabla_attn.core.select import NUM_PASSES, count_of_share, select_by_mass, select_top
from nabla_attn.core.tiles import mean_of_pairs, share_pairs_
from nabla_attn.core.window import build_first_frame_map, build_segment_map, build_window_map
from nabla_attn.fusion import fused, take_any_length
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
) -> BlockMap:
    """Pool, score and select blocks of queries and keys.

    Memory beside the map is bounded, whatever the number of heads and tokens. Everything is
    computed in fp32, autocast or not: a rounded map is a different result.

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
    """
    grid = layout.grid
    shape = (*q.shape[:2], grid.num_blocks, grid.num_blocks)
    if 0 in shape:
        empty = torch.ones(shape, dtype=torch.bool, device=q.device)
        return block_map_of(empty, layout, text_valid, kept_mass=empty.new_empty(shape[:2]).float())
    if not config.is_adaptive and not measure:
        kept = _select_by_geometry(layout, config, q.device)
        return block_map_of(kept.expand(shape), layout, text_valid)
    # The strips of text stay as they are: kept.
    whole = torch.ones(
        (*shape[:2], layout.num_blocks, layout.num_blocks), dtype=torch.bool, device=q.device
    )
    kept = whole[:, :, : grid.num_blocks, : grid.num_blocks].flatten(0, 1)
    q, k = (pool_video(x, layout, is_raster=is_raster).flatten(0, 1) for x in (q, k))
    mass = _select_by_content_(kept, q, k, layout, config, scale).view(shape[:2])
    return whole_block_map(whole, layout, text_valid, kept_mass=mass if measure else None)


def _select_by_geometry(
    layout: TokenLayout, config: SparseConfig, device: torch.device
) -> Bool[Tensor, "q_blocks kv_blocks"]:
    """Blocks that are kept whatever the tokens hold; all of them without a window."""
    count = layout.grid.num_blocks
    always = _always_kept(layout, config, device)
    if always is None:
        kept = torch.ones(count, count, dtype=torch.bool, device=device)
    else:
        # The window's map is cached, and a caller may write in what it is given.
        kept = always.clone()
    if config.pair_queries is not None:
        share_pairs_(kept[None])
    clips = _same_clip(layout, device)
    return kept if clips is None else kept & clips


def _select_by_content_(
    kept: Bool[Tensor, "heads q_blocks kv_blocks"],
    q_pooled: Float[Tensor, "heads q_blocks dim"],
    k_pooled: Float[Tensor, "heads kv_blocks dim"],
    layout: TokenLayout,
    config: SparseConfig,
    scale: float | None,
) -> Float[Tensor, " heads"]:
    """Fill `kept`; returns the mass that each head's rows hold, their mean."""
    always, clips = _always_kept(layout, config, kept.device), _same_clip(layout, kept.device)
    if config.pair_queries == "pool":
        counts = block_order(layout, kept.device).counts[: layout.grid.num_blocks]
        q_pooled = mean_of_pairs(q_pooled, counts, clips)
    target = _targets(layout.grid, config, q_pooled.dtype, kept.device)
    mass = _select_panels_(kept, q_pooled, k_pooled, target, _rule(config), always, clips, scale)
    if config.pair_queries is not None:
        share_pairs_(kept)
        if clips is not None:
            kept &= clips
    return mass.mean(dim=1)


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
    if is_raster and not layout.is_ragged and not layout.num_text:
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


def _rule(config: SparseConfig) -> str:
    if config.is_adaptive:
        return "mass" if config.threshold is not None else "share"
    return "all" if config.window is None else "none"


@lru_cache(maxsize=32)
def _targets(
    grid: TokenGrid, config: SparseConfig, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "q_blocks 1"]:
    """What each row must reach: a mass, or a number of blocks out of its own clip's; cached."""
    # What is made under inference_mode could not be used outside, and a GPU's host would wait.
    with torch.inference_mode(False), torch.no_grad():
        if config.topk is None:
            target = config.threshold or 1.0
            return torch.full((grid.num_blocks, 1), target, dtype=dtype, device=device)
        per_time = grid.num_blocks // grid.blocks[0]
        counts = [count_of_share(config.topk, blocks * per_time) for blocks in grid.segment_blocks]
        lengths = torch.tensor([blocks * per_time for blocks in grid.segment_blocks])
        targets = torch.tensor(counts, dtype=dtype)
        targets = targets.repeat_interleave(lengths, output_size=grid.num_blocks)
        return targets[:, None].to(device)


def _always_kept(
    layout: TokenLayout, config: SparseConfig, device: torch.device
) -> Bool[Tensor, "q_blocks kv_blocks"] | None:
    """Blocks that are kept whatever the tokens hold, or None."""
    always = None
    if config.window is not None:
        always = build_window_map(layout.grid, config.window, device)
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
    target: Tensor,
    rule: str,
    always: Tensor | None,
    clips: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Fill `kept` panel by panel; returns the mass that each row holds."""
    mass = q_pooled.new_empty(q_pooled.shape[:2])
    run = fused(_select_panel, kept.numel() * NUM_PASSES, kept.device)
    # A compiled kernel on a CPU reads and writes bytes ten times as fast as bools.
    always = None if always is None else always.byte()
    for heads, rows in _panels(*kept.shape):
        fixed, allowed = (None if x is None else x[rows] for x in (always, clips))
        probs = score_blocks(q_pooled[heads, rows], k_pooled[heads], scale=scale, allowed=allowed)
        if run is not _select_panel:
            take_any_length(probs)
        kept_bytes, mass[heads, rows] = run(probs, target[rows], fixed, allowed, rule)
        kept[heads, rows] = kept_bytes.view(torch.bool)
    return mass


def _select_panel(
    probs: Tensor, target: Tensor, fixed: Tensor | None, allowed: Tensor | None, rule: str
) -> tuple[Tensor, Tensor]:
    """Kept blocks of some rows of some heads, as bytes, and the probability that they hold."""
    # One axis for all rows of all heads: a compiler then loops over it once.
    rows, targets = probs.flatten(0, 1), target.repeat(len(probs), 1)
    if rule == "mass":
        kept = select_by_mass(rows, targets).view_as(probs)
    elif rule == "share":
        kept = select_top(rows, targets).view_as(probs)
    else:
        kept = torch.full_like(probs, rule == "all", dtype=torch.bool)
    kept = kept if fixed is None else kept | (fixed > 0)
    kept = kept if allowed is None else kept & allowed
    kept_bytes = torch.where(kept, 1.0, 0.0).byte()
    return kept_bytes, (probs * kept_bytes).sum(dim=-1)
