"""FlexAttention's form of a block map: tables of the key blocks that each query tile attends."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from nabla_attn.core.order import BlockOrder
from nabla_attn.core.tiles import tile_rows
from nabla_attn.shapes import Bool, Int


class KeptColumns(NamedTuple):
    """Kept columns of every row of a map.

    Attributes:
        counts: How many columns a row keeps.
        columns: Their indices in front, ascending; what follows means nothing.
    """

    counts: Int[Tensor, " *rows"]
    columns: Int[Tensor, "*rows num_columns"]


class FlexTables(NamedTuple):
    """What FlexAttention reads; no two are one tensor, though some share memory.

    Attributes:
        partial: Key blocks of each query tile behind a mask.
        full: Key blocks that it attends whole.
        transposed: Partial and full query tiles of each key block, for the backward, or None.
        valid: Slots that may be attended, per sample or for all (leading axis 1).
        mask: The map, where a tile spans several query blocks that keep different key blocks.
        shown: Summaries that each query block attends, and True behind them; None without a tail.
        columns: The column of `shown` for every key slot, the last one for tokens.
    """

    partial: KeptColumns
    full: KeptColumns
    transposed: tuple[KeptColumns, KeptColumns] | None
    valid: Bool[Tensor, "samples kv_slots"]
    mask: Bool[Tensor, "batch heads q_blocks kv_blocks"] | None
    shown: Bool[Tensor, "batch heads q_blocks summaries"] | None
    columns: Int[Tensor, " kv_slots"] | None


def build_flex_tables(
    mask: Bool[Tensor, "batch heads q_blocks kv_blocks"],
    valid: Bool[Tensor, "samples kv_slots"] | None,
    block_tokens: int,
    rows_per_tile: int = 1,
    needs_backward: bool = False,
    shown: Bool[Tensor, "batch heads q_blocks summaries"] | None = None,
) -> FlexTables:
    """The tables of a map.

    A key block is partial if it has empty slots or summaries, or if only some query blocks of a
    tile keep it.

    Args:
        mask: Kept pairs of blocks.
        valid: Slots that may be attended; None is all.
        block_tokens: Slots of a block.
        rows_per_tile: Query blocks of one tile.
        needs_backward: Make the transposed tables too.
        shown: Summaries that each query block attends, the last key slots.
    """
    some, full = tile_rows(mask, rows_per_tile)
    if valid is None:
        valid = mask.new_ones(1, mask.shape[-1] * block_tokens)
    else:
        full = full & valid.unflatten(1, (-1, block_tokens)).all(dim=2)[:, None, None, :]
    columns = None
    if shown is not None:
        count = shown.shape[-1]
        full = full.clone()
        full[..., -(count // block_tokens) :] = False
        columns = torch.full((valid.shape[-1],), count, dtype=torch.int32, device=mask.device)
        columns[-count:] = torch.arange(count, dtype=torch.int32, device=mask.device)
        shown = torch.nn.functional.pad(shown, (0, 1), value=True)
    partial = some & ~full
    transposed = (compact(partial.mT), compact(full.mT)) if needs_backward else None
    own_mask = mask if rows_per_tile > 1 else None
    return FlexTables(compact(partial), compact(full), transposed, valid, own_mask, shown, columns)


def build_layout_tables(
    mask: Bool[Tensor, "batch heads q_blocks kv_blocks"],
    valid: Bool[Tensor, "samples kv_slots"] | None,
    block_tokens: int,
    order: BlockOrder,
    needs_backward: bool = False,
    compile: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function,
) -> FlexTables:
    """The tables of a map in tiles of one query block, where the layout says what is masked.

    One index holds both tables, full blocks in front and masked ones behind; in the transposed one
    a key block has query blocks of one kind, so one index serves both.

    Args:
        mask: Kept pairs of blocks.
        valid: Slots that may be attended; None is all.
        block_tokens: Slots of a block.
        order: The tables of the layout.
        needs_backward: Make the transposed tables too.
        compile: Compiles a function that fills an index.
    """
    is_masked, num_whole = order.is_masked, order.is_masked.numel() - order.masked.numel()
    index = torch.empty(mask.shape, dtype=torch.int32, device=mask.device)
    full, masked = compile(fill_both_)(index, mask, is_masked, order.place, num_whole)
    # One column at least, even where none counts: not all of FlexAttention's kernels take none.
    columns = index[..., : max(num_whole, 1)], index[..., min(num_whole, mask.shape[-1] - 1) :]
    transposed = None
    if needs_backward:
        index = torch.empty(mask.mT.shape, dtype=torch.int32, device=mask.device)
        counts = compile(fill_)(index, mask.mT)
        zero = torch.zeros_like(counts)
        transposed = (
            KeptColumns(torch.where(is_masked, counts, zero), index),
            KeptColumns(torch.where(is_masked, zero, counts), index.view(index.shape)),
        )
    if valid is None:
        valid = mask.new_ones(1, mask.shape[-1] * block_tokens)
    partial = KeptColumns(masked, columns[1])
    return FlexTables(partial, KeptColumns(full, columns[0]), transposed, valid, None, None, None)


def fill_both_(
    index: Int[Tensor, "*rows columns"],
    mask: Bool[Tensor, "*rows columns"],
    is_masked: Bool[Tensor, " columns"],
    place: Int[Tensor, " columns"],
    num_whole: int,
) -> tuple[Int[Tensor, " *rows"], Int[Tensor, " *rows"]]:
    """Fill an index with kept columns and, behind `num_whole`, with kept masked ones.

    Returns:
        How many of the first and of the second kind are kept.
    """
    whole, masked = mask & ~is_masked, mask & is_masked
    front = _target(mask, whole, place, num_whole)
    behind = _target(mask, masked, place, mask.shape[-1] - num_whole) + num_whole
    _write(index, torch.where(is_masked, behind, front))
    return whole.sum(dim=-1, dtype=torch.int32), masked.sum(dim=-1, dtype=torch.int32)


def fill_(
    index: Int[Tensor, "*rows columns"], mask: Bool[Tensor, "*rows columns"]
) -> Int[Tensor, " *rows"]:
    """Fill an index with the kept columns of every row; return their number."""
    place = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device)
    _write(index, _target(mask, mask, place, mask.shape[-1]))
    return mask.sum(dim=-1, dtype=torch.int32)


def _target(mask: Tensor, of_kind: Tensor, place: Tensor, size: int) -> Tensor:
    """Where every column of a kind goes: kept ones to the front, dropped ones from the back on.

    So each place is written once, and no column waits for the number of all.
    """
    rank = of_kind.cumsum(dim=-1, dtype=torch.int32)
    return torch.where(mask, rank - 1, size - 1 - (place - rank))


def _write(index: Tensor, target: Tensor) -> None:
    rows = index.flatten(0, -2)
    columns = torch.arange(rows.shape[1], dtype=torch.int32, device=index.device)
    number = torch.arange(rows.shape[0], device=index.device)[:, None]
    # A compiler writes in place what is put, and copies what is scattered.
    rows.index_put_((number, target.flatten(0, -2).long()), columns.expand_as(rows))


def compact(mask: Bool[Tensor, "*rows columns"]) -> KeptColumns:
    """Kept columns of every row, without sorting: each goes to its rank, dropped ones behind."""
    index = torch.empty(mask.shape, dtype=torch.int32, device=mask.device)
    return KeptColumns(fill_(index, mask), index)


def build_block_mask(tables: FlexTables, block_tokens: int, *, rows_per_tile: int = 1) -> BlockMask:
    """A BlockMask from tables.

    Args:
        tables: Of a map.
        block_tokens: Slots of a block.
        rows_per_tile: Query blocks of one tile, as the tables were made for.
    """
    valid, mask, shown, columns = tables.valid, tables.mask, tables.shown, tables.columns
    per_sample = valid.shape[0] > 1

    def is_valid_key(batch: Tensor, head: Tensor, q_slot: Tensor, kv_slot: Tensor) -> Tensor:
        return valid[batch if per_sample else 0, kv_slot]

    def is_kept(batch: Tensor, head: Tensor, q_slot: Tensor, kv_slot: Tensor) -> Tensor:
        assert mask is not None
        kept = mask[batch, head, q_slot // block_tokens, kv_slot // block_tokens]
        return kept & is_valid_key(batch, head, q_slot, kv_slot)

    sees_token = is_valid_key if mask is None else is_kept

    def sees(batch: Tensor, head: Tensor, q_slot: Tensor, kv_slot: Tensor) -> Tensor:
        assert shown is not None and columns is not None
        is_shown = shown[batch, head, q_slot // block_tokens, columns[kv_slot]]
        return is_shown & sees_token(batch, head, q_slot, kv_slot)

    q_blocks = tables.full.columns.shape[-2] if mask is None else mask.shape[-2]
    partial_q, full_q = tables.transposed or (KeptColumns(None, None), KeptColumns(None, None))  # type: ignore[arg-type]
    return BlockMask(
        seq_lengths=(q_blocks * block_tokens, valid.shape[-1]),
        kv_num_blocks=tables.partial.counts,
        kv_indices=tables.partial.columns,
        full_kv_num_blocks=tables.full.counts,
        full_kv_indices=tables.full.columns,
        q_num_blocks=partial_q.counts,
        q_indices=partial_q.columns,
        full_q_num_blocks=full_q.counts,
        full_q_indices=full_q.columns,
        BLOCK_SIZE=(rows_per_tile * block_tokens, block_tokens),
        mask_mod=sees_token if shown is None else sees,
    )
