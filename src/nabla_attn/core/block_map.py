"""BlockMap: which key blocks every query block attends, per sample and head."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from nabla_attn.core.flex_tables import FlexTables, build_block_mask, build_flex_tables
from nabla_attn.core.order import BlockOrder, TokenLayout, block_order
from nabla_attn.shapes import Bool, Float, Int

# Pairs of blocks counted at once: 128 MB as fp32.
PANEL_PAIRS = 2**25


@dataclass(frozen=True, eq=False)
class HeadOrder:
    """Tokens of one sequence cut into blocks in an order of each head's own.

    Tokens are counted in raster order. An order need not be a permutation: queries that are left
    out take the output of another slot.

    Attributes:
        tokens: The token of every slot, -1 where it is empty; leading axes of 1 stand for all.
        slots: The slot whose output is each token's.
    """

    tokens: Int[Tensor, "#batch #heads slots"]
    slots: Int[Tensor, "#batch #heads tokens"]

    def sample(self, chosen: slice) -> "HeadOrder":
        """The order of one sample."""
        return HeadOrder(*(x[chosen] if len(x) > 1 else x for x in (self.tokens, self.slots)))


@dataclass(frozen=True, eq=False)
class Treatment:
    """What a method does beside choosing blocks, to tokens in the order in which they are attended.

    Attributes:
        prepare: From q, k, v to those that are attended.
        finish: From the output and q, k, v to the output.
    """

    prepare: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None = None
    finish: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None


@dataclass(frozen=True, eq=False)
class BlockMap:
    """Kept pairs of blocks in block order, and which token slots hold a token.

    Attributes:
        mask: True where a query block attends a key block.
        q_counts: Tokens of every query block; with head orders for each sample and head, which
            then share the first axis.
        kv_valid: Slots that may be attended, per sample or for all (leading axis 1), with head
            orders per sample and head; None when every slot holds a token.
        block_tokens: Slots of a block.
        kept_mass: Probability mass of the pooled map that is kept, mean over the rows of each
            sample and head, where it was measured.
        tail_density: Scores of the summaries that stand for dropped blocks / all token pairs,
            where it was measured (see `core.tail`).
        q_order: How each head's queries are laid in blocks, of the whole sequence; None is the
            block order of the layout.
        kv_order: The same of keys and values; both or neither are given.
        treatment: What the method does beside; None is nothing.
        num_pairs: With head orders, all token pairs of every sample and head on one axis: orders
            may leave tokens out or repeat them.
        order: The tables of the layout whose key blocks these are, which say what may be masked;
            None leaves that to `kv_valid`.
    """

    mask: Bool[Tensor, "batch heads q_blocks kv_blocks"]
    q_counts: Int[Tensor, "*rows q_blocks"]
    kv_valid: Bool[Tensor, "samples kv_slots"] | None
    block_tokens: int
    kept_mass: Float[Tensor, "batch heads"] | None = None
    tail_density: Float[Tensor, "batch heads"] | None = None
    q_order: HeadOrder | None = None
    kv_order: HeadOrder | None = None
    treatment: Treatment | None = None
    num_pairs: Int[Tensor, " rows"] | None = None
    order: BlockOrder | None = None

    def __repr__(self) -> str:
        batch, heads, q_blocks, kv_blocks = self.mask.shape
        return (
            f"BlockMap({batch} samples, {heads} heads, {q_blocks}x{kv_blocks} blocks of "
            f"{self.block_tokens} tokens, density {self.density:.3f})"
        )

    @property
    def kv_counts(self) -> Int[Tensor, "samples kv_blocks"]:
        """Tokens of every key block that may be attended."""
        if self.kv_valid is None:
            return self.q_counts.new_full((1, self.mask.shape[-1]), self.block_tokens)
        return self.kv_valid.unflatten(1, (-1, self.block_tokens)).sum(dim=2)

    @property
    def head_density(self) -> Float[Tensor, "batch heads"]:
        """Kept token pairs / all token pairs, per sample and head; stays on the device."""
        if self.q_order is not None:
            return self.folded.head_density.view(self.mask.shape[:2])
        kv_counts, q_counts = self.kv_counts, self.q_counts.view(-1, 1, self.mask.shape[2])
        # Counts do not fit the dtypes of autocast: fp16 ends at 65,504.
        with torch.autocast(self.mask.device.type, enabled=False):
            kept = (self._kept_tokens(kv_counts) * q_counts).sum(-1, dtype=torch.float64)
        pairs = q_counts.sum(dim=2) * kv_counts.sum(dim=1, keepdim=True)
        return (kept / (pairs if self.num_pairs is None else self.num_pairs[:, None])).float()

    def _kept_tokens(self, kv_counts: Tensor) -> Float[Tensor, "batch heads q_blocks"]:
        """How many tokens each query block attends."""
        if self.order is not None:
            # Whole blocks by their number: the map is read once, and not as floats.
            masked = self.order.masked
            missing = (self.block_tokens - kv_counts[:, masked]).to(torch.float32)
            missing = self.mask[..., masked].to(torch.float32) @ missing[:, None, :, None]
            whole = self.mask.sum(dim=-1, dtype=torch.float32) * self.block_tokens
            return whole - missing.squeeze(-1)
        weights = kv_counts.to(torch.float32)[:, None, :, None]
        # As floats the mask is four times as large: a few heads at a time.
        heads = max(1, PANEL_PAIRS // max(1, self.mask[:, :1].numel()))
        parts = [part.to(torch.float32) @ weights for part in self.mask.split(heads, dim=1)]
        return torch.cat(parts, dim=1).squeeze(-1)

    @property
    def folded(self) -> "BlockMap":
        """A map with head orders as one of single heads: each sample and head is a sample."""
        return replace(self, mask=self.mask.flatten(0, 1)[:, None], q_order=None, kv_order=None)

    @property
    def density(self) -> float:
        """Kept token pairs / all token pairs, over all samples and heads; NaN where none are."""
        return self.head_density.mean().item()

    def union(self, other: Bool[Tensor, "*batch q_blocks kv_blocks"]) -> "BlockMap":
        """Keep the blocks of `other` too."""
        return BlockMap(self.mask | other, self.q_counts, self.kv_valid, self.block_tokens)

    def sample(self, index: int) -> "BlockMap":
        """The map of one sample of the batch, as a batch of one."""
        chosen = slice(index, index + 1 or None)
        valid, counts, pairs = self.kv_valid, self.q_counts, self.num_pairs
        if self.q_order is not None:
            # Heads share the first axis with samples.
            heads = self.mask.shape[1]
            counts = counts.unflatten(0, (-1, heads))[chosen].flatten(0, 1)
            pairs = None if pairs is None else pairs.unflatten(0, (-1, heads))[chosen].flatten(0, 1)
            if valid is not None:
                valid = valid.unflatten(0, (-1, heads))[chosen].flatten(0, 1)
        elif valid is not None and len(valid) > 1:
            valid = valid[chosen]
        mass, tail = (None if x is None else x[chosen] for x in (self.kept_mass, self.tail_density))
        q_order, kv_order = (x and x.sample(chosen) for x in (self.q_order, self.kv_order))
        return replace(
            self,
            mask=self.mask[chosen],
            q_counts=counts,
            kv_valid=valid,
            kept_mass=mass,
            tail_density=tail,
            q_order=q_order,
            kv_order=kv_order,
            num_pairs=pairs,
        )

    def to_block_mask(self) -> BlockMask:
        """FlexAttention's form of the map, key blocks ascending, for forward use.

        Blocks with empty slots become partial blocks behind a mask of valid keys; all others are
        full blocks. No index tables for a backward are built.
        """
        return build_block_mask(self.flex_tables(), self.block_tokens)

    def flex_tables(self, rows_per_tile: int = 1, *, needs_backward: bool = False) -> FlexTables:
        """The map's tables, which have a column for every key block.

        Args:
            rows_per_tile: Query blocks of one tile.
            needs_backward: Make the transposed tables too.
        """
        facts = (self.mask, self.kv_valid, self.block_tokens)
        return build_flex_tables(*facts, rows_per_tile, needs_backward)


def block_map_of(
    video_mask: Bool[Tensor, "batch heads q_blocks kv_blocks"],
    layout: TokenLayout,
    text_valid: Bool[Tensor, "batch text"] | None = None,
    *,
    kept_mass: Float[Tensor, "batch heads"] | None = None,
) -> BlockMap:
    """Wrap a map of video blocks, adding dense strips of text: text sees all and is seen by all.

    Args:
        video_mask: Kept pairs of video blocks.
        layout: Where the tokens are.
        text_valid: False where a sample's text is padding, which is never attended; None is all.
        kept_mass: As in `BlockMap`.

    Raises:
        ValueError: `text_valid` does not have one entry per sample and text token.
    """
    num_text_blocks = layout.num_blocks - layout.grid.num_blocks
    pad = (0, num_text_blocks, 0, num_text_blocks)
    mask = torch.nn.functional.pad(video_mask, pad, value=True) if num_text_blocks else video_mask
    return whole_block_map(mask, layout, text_valid, kept_mass=kept_mass)


def whole_block_map(
    mask: Bool[Tensor, "batch heads q_blocks kv_blocks"],
    layout: TokenLayout,
    text_valid: Bool[Tensor, "batch text"] | None = None,
    *,
    kept_mass: Float[Tensor, "batch heads"] | None = None,
) -> BlockMap:
    """Wrap a map that has its strips of text; arguments as for `block_map_of`."""
    order = block_order(layout, mask.device)
    kv_valid = valid_slots(layout, mask.shape[0], text_valid, mask.device)
    block = layout.grid.block.tokens
    return BlockMap(mask, order.counts, kv_valid, block, kept_mass, order=order)


def valid_slots(
    layout: TokenLayout, batch: int, text_valid: Tensor | None, device: torch.device
) -> Bool[Tensor, "samples kv_slots"] | None:
    """Slots in block order that may be attended, one row for all samples or one each; None is all.

    Raises:
        ValueError: `text_valid` does not have one entry per sample and text token.
    """
    if text_valid is None and not layout.is_ragged:
        return None
    valid = torch.ones(1, layout.num_slots, dtype=torch.bool, device=device)
    valid[:, block_order(layout, device).empty_slots] = False
    if text_valid is None:
        return valid
    if text_valid.shape != (batch, layout.num_text):
        raise ValueError(
            f"text_valid must be [batch, text tokens] = ({batch}, {layout.num_text}): got "
            f"{tuple(text_valid.shape)}. Pass one bool per sample and text token."
        )
    valid = valid.repeat(batch, 1)
    start = layout.grid.num_slots
    valid[:, start : start + layout.num_text] = text_valid.bool()
    return valid


def map_in_head_orders(
    video_mask: Bool[Tensor, "#batch #heads q_blocks kv_blocks"],
    q_order: HeadOrder,
    kv_order: HeadOrder,
    layout: TokenLayout,
    text_valid: Bool[Tensor, "batch text"] | None,
    shape: tuple[int, int],
    *,
    text_keys: Bool[Tensor, " kv_blocks"] | None = None,
) -> BlockMap:
    """Wrap a map of blocks in head orders, adding dense strips of text behind the video's.

    Args:
        video_mask: Kept pairs of the orders' blocks.
        q_order: The order of the video's queries.
        kv_order: The order of its keys and values.
        layout: Where the tokens are.
        text_valid: False where a sample's text is padding; None is all.
        shape: Samples and heads.
        text_keys: The video's key blocks that text attends; None is all.
    """
    q_order, kv_order = (_with_text(order, layout, shape) for order in (q_order, kv_order))
    block = layout.grid.block.tokens
    num_text_blocks = layout.num_blocks - layout.grid.num_blocks
    pad = (0, num_text_blocks, 0, num_text_blocks)
    mask = torch.nn.functional.pad(video_mask.expand(*shape, -1, -1), pad, value=True)
    if text_keys is not None:
        mask[:, :, video_mask.shape[2] :, : video_mask.shape[3]] = text_keys
    valid = kv_order.tokens >= 0
    num_keys = torch.full((shape[0],), layout.num_tokens, device=valid.device)
    if text_valid is not None:
        is_valid = torch.ones(
            shape[0], layout.num_tokens, dtype=torch.bool, device=text_valid.device
        )
        after = layout.num_tokens - layout.text_after
        is_valid[:, : layout.text_before] = text_valid[:, : layout.text_before]
        is_valid[:, after:] = text_valid[:, layout.text_before :]
        slots = kv_order.tokens.clamp_min(0).flatten(1)
        valid = valid & is_valid.gather(1, slots).view_as(valid)
        num_keys = is_valid.sum(dim=1)
    return BlockMap(
        mask,
        (q_order.tokens >= 0).flatten(0, 1).unflatten(1, (-1, block)).sum(dim=2),
        valid.flatten(0, 1),
        block,
        q_order=q_order,
        kv_order=kv_order,
        num_pairs=(num_keys * layout.num_tokens).repeat_interleave(shape[1]),
    )


def _with_text(order: HeadOrder, layout: TokenLayout, shape: tuple[int, int]) -> HeadOrder:
    """An order of the video's tokens as one of the whole sequence, text in blocks behind it."""
    tokens, slots = (x.expand(*shape, -1) for x in (order.tokens, order.slots))
    tables, first = block_order(layout, tokens.device), layout.grid.num_slots
    text = tables.to_blocks[first:].clone()
    empty = tables.empty_slots
    text[empty[empty >= first] - first] = -1
    before, after = layout.text_before, layout.num_tokens - layout.text_after
    moved = tables.to_raster - first + tokens.shape[-1]
    parts = (moved[:before].expand(*shape, -1), slots, moved[after:].expand(*shape, -1))
    tokens = torch.where(tokens >= 0, tokens + before, -1)
    return HeadOrder(torch.cat([tokens, text.expand(*shape, -1)], dim=-1), torch.cat(parts, dim=-1))
