"""Raster order <-> block order, for anything that has a token axis.

Block order runs over blocks (time, row, column), and inside a block over its tokens in raster
order, the empty slots of a ragged block last (reference: wan/modules/attention.py:187-214); where
the grid has an order of tokens, it is that. Text tokens that share the sequence follow in blocks of
their own, wherever they stood.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.token_orders import TokenOrder
from nabla_attn.shapes import Bool, Int


@dataclass(frozen=True)
class TokenLayout:
    """A token sequence: a video grid, and text tokens before and after it.

    Args:
        grid: The video's tokens.
        text_before: Text tokens in front of the video.
        text_after: Text tokens behind it.

    Raises:
        ValueError: A text length is negative.
    """

    grid: TokenGrid
    text_before: int = 0
    text_after: int = 0

    def __post_init__(self) -> None:
        if self.text_before < 0 or self.text_after < 0:
            raise ValueError(
                f"text lengths must not be negative: got {self.text_before} before and "
                f"{self.text_after} after the video."
            )

    @property
    def num_text(self) -> int:
        """Text tokens on both sides."""
        return self.text_before + self.text_after

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence."""
        return self.grid.num_tokens + self.num_text

    @property
    def num_blocks(self) -> int:
        """Blocks of the video, then of the text."""
        return self.grid.num_blocks - (-self.num_text // self.grid.block.tokens)

    @property
    def num_slots(self) -> int:
        """Token slots in block order."""
        return self.num_blocks * self.grid.block.tokens

    @property
    def is_ragged(self) -> bool:
        """Whether some block has empty slots."""
        return self.num_slots != self.num_tokens


@dataclass(frozen=True, eq=False)
class BlockOrder:
    """The index tables of one layout on one device.

    Attributes:
        to_blocks: Token of every slot; an empty slot repeats some token.
        to_raster: Slot of every token.
        empty_slots: Slots that hold no token.
        counts: Tokens of every block.
        is_filled: Slots of every block that hold a token, its first.
        is_masked: Blocks that may have slots which nothing attends: ragged ones, and text.
        masked: Their indices.
        place: How many blocks of the same kind, masked or not, stand in front of each.
    """

    to_blocks: Int[Tensor, " slots"]
    to_raster: Int[Tensor, " tokens"]
    empty_slots: Int[Tensor, " empty"]
    counts: Int[Tensor, " blocks"]
    is_filled: Bool[Tensor, "blocks block_tokens"]
    is_masked: Bool[Tensor, " blocks"]
    masked: Int[Tensor, " masked"]
    place: Int[Tensor, " blocks"]


@lru_cache(maxsize=64)
def block_order(layout: TokenLayout, device: torch.device) -> BlockOrder:
    """Build, or take from the cache, the index tables of `layout` on `device`."""
    # Tables made under inference_mode could not be saved for a later backward.
    with torch.inference_mode(False), torch.no_grad():
        slots = torch.cat([_video_slots(layout), _text_slots(layout)])
        is_token = slots >= 0
        counts = is_token.sum(dim=1)
        # A stable sort moves the empty slots of each block behind its tokens.
        slots = slots.gather(1, (~is_token).to(torch.int8).argsort(dim=1, stable=True)).flatten()
        filled = (slots >= 0).nonzero().flatten()
        to_raster = torch.empty(layout.num_tokens, dtype=torch.long)
        to_raster[slots[filled]] = filled
        empty = (slots < 0).nonzero().flatten()
        is_filled = torch.arange(layout.grid.block.tokens) < counts[:, None]
        is_masked = ~is_filled.all(dim=1)
        is_masked[layout.grid.num_blocks :] = True
        place = torch.where(is_masked, is_masked.cumsum(0), (~is_masked).cumsum(0)) - 1
        place = place.to(torch.int32)
        kinds = (is_filled, is_masked, is_masked.nonzero().flatten(), place)
        tables = (slots.clamp_min(0), to_raster, empty, counts, *kinds)
        return BlockOrder(*(table.to(device) for table in tables))


def _video_slots(layout: TokenLayout) -> Int[Tensor, "blocks block_tokens"]:
    """Token of every slot of the video's blocks, -1 where a ragged block is empty."""
    grid, block = layout.grid, layout.grid.block
    if grid.order is not None:
        tokens, clips = tokens_in_order(grid, grid.order) + layout.text_before, []
        for clip in tokens.split(
            [frames * grid.height * grid.width for frames in grid.segment_frames]
        ):
            missing = -len(clip) % block.tokens
            clips.append(torch.nn.functional.pad(clip, (0, missing), value=-1))
        return torch.cat(clips).view(grid.num_blocks, block.tokens)
    time, rows, columns = grid.blocks
    padded = torch.full((time * block.frames, rows * block.height, columns * block.width), -1)
    tokens = torch.arange(grid.num_tokens).view(grid.frames, grid.height, grid.width)
    padded[_padded_frames(grid), : grid.height, : grid.width] = tokens + layout.text_before
    split = padded.view(time, block.frames, rows, block.height, columns, block.width)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(grid.num_blocks, block.tokens)


def tokens_in_order(grid: TokenGrid, order: TokenOrder) -> Int[Tensor, " tokens"]:
    """Raster index of the token at every position; packed clips keep their places."""
    clips, start = [], 0
    for frames in grid.segment_frames:
        clips.append(order.permutation(frames, grid.height, grid.width) + start)
        start += frames * grid.height * grid.width
    return torch.cat(clips)


def _padded_frames(grid: TokenGrid) -> Int[Tensor, " frames"]:
    """Position of every frame once each clip is filled up to whole blocks."""
    positions, start = [], 0
    for frames, blocks in zip(grid.segment_frames, grid.segment_blocks, strict=True):
        positions.append(torch.arange(start, start + frames))
        start += blocks * grid.block.frames
    return torch.cat(positions)


def _text_slots(layout: TokenLayout) -> Int[Tensor, "blocks block_tokens"]:
    block_tokens = layout.grid.block.tokens
    slots = torch.full((layout.num_slots - layout.grid.num_slots,), -1)
    slots[: layout.text_before] = torch.arange(layout.text_before)
    after = torch.arange(layout.text_after) + layout.text_before + layout.grid.num_tokens
    slots[layout.text_before : layout.num_text] = after
    return slots.view(-1, block_tokens)


def check_tokens(x: Tensor, layout: TokenLayout, dim: int = 2) -> None:
    """Raise ValueError unless `x` holds the layout's tokens along `dim`."""
    _check_length(x, dim, layout.num_tokens, layout, "tokens")


def text_entries(valid: Tensor, layout: TokenLayout) -> Tensor:
    """Those of a mask [batch, text tokens or all tokens] that are about text tokens.

    Raises:
        ValueError: The sequence has no text, so the mask is about the video.
    """
    if layout.num_text == 0:
        raise ValueError(
            "a mask over video tokens cannot be combined with block-sparse attention. Pass no "
            "attention_mask for the video, or make the layers dense in the schedule."
        )
    if valid.shape[1] != layout.num_tokens:
        return valid
    after = layout.num_tokens - layout.text_after
    return torch.cat([valid[:, : layout.text_before], valid[:, after:]], dim=1)


def to_blocks(x: Tensor, grid: TokenGrid | TokenLayout, dim: int = 2) -> Tensor:
    """Bring the token axis `dim` from raster order into block order; empty slots become zero.

    Args:
        x: Any tensor with the grid's tokens along `dim` (q, k, v, hidden states, RoPE tables).
        grid: The token grid, or a layout that holds one and its text.
        dim: The token axis.

    Returns:
        A tensor with `num_slots` entries along `dim`.

    Raises:
        ValueError: The axis does not hold the grid's tokens.
    """
    layout = _as_layout(grid)
    check_tokens(x, layout, dim)
    if has_whole_rows(x, dim):
        return to_blocks(x.transpose(1, 2), layout, 1).transpose(1, 2)
    order = block_order(layout, x.device)
    blocks = x.index_select(dim, order.to_blocks)
    return blocks.index_fill_(dim, order.empty_slots, 0) if layout.is_ragged else blocks


def to_raster(x: Tensor, grid: TokenGrid | TokenLayout, dim: int = 2) -> Tensor:
    """Undo `to_blocks`: slots -> tokens along `dim`.

    Raises:
        ValueError: The axis does not hold the grid's slots.
    """
    layout = _as_layout(grid)
    _check_length(x, dim, layout.num_slots, layout, "slots")
    if has_whole_rows(x, dim):
        return to_raster(x.transpose(1, 2), layout, 1).transpose(1, 2)
    return x.index_select(dim, block_order(layout, x.device).to_raster)


def write_raster(out: Tensor, x: Tensor, layout: TokenLayout) -> None:
    """Write `to_raster` of x [batch, heads, slots, dim] to where heads of a token are together."""
    order = block_order(layout, x.device)
    torch.index_select(x.transpose(1, 2), 1, order.to_raster, out=out.transpose(1, 2))


def has_whole_rows(x: Tensor, dim: int = 2) -> bool:
    """Whether all heads of a token lie together, [batch, tokens, heads, dim] in memory, on a GPU.

    They are moved together there and stay so: that makes longer rows, and a model joins the heads
    of the output without copying it. A CPU's products want the tokens of a head together.
    """
    is_split = x.device.type == "cuda" and x.dim() == 4 and dim == 2
    return is_split and x.transpose(1, 2).is_contiguous() and not x.is_contiguous()


def _as_layout(grid: TokenGrid | TokenLayout) -> TokenLayout:
    return grid if isinstance(grid, TokenLayout) else TokenLayout(grid)


def _check_length(x: Tensor, dim: int, length: int, layout: TokenLayout, what: str) -> None:
    if x.shape[dim] != length:
        text = f" + {layout.num_text} text tokens" if layout.num_text else ""
        raise ValueError(
            f"{what} do not match the grid: got {x.shape[dim]} {what} for {layout.grid}{text} = "
            f"{length}. Pass the grid of the latents, and text_before=, text_after= for joint text."
        )
