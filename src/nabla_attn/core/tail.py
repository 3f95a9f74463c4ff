"""Tails: an estimate of the blocks that a map drops, in the same softmax as the kept tokens.

A dropped block j of n_j tokens with mean key k̄_j and mean value v̄_j stands as one summary: a key
k̄_j with value v̄_j and log n_j added to its score, that is n_j tokens that are all the mean
("mean"). To first order, exp(s q·k_c) = exp(s q·k̄_j) (1 + s q·(k_c - k̄_j)) for its tokens c. As
deviations from a mean sum to zero, the denominator stays and the output gains

    sum over dropped j of w_j s q·H_j / n_j,    H_j = sum over c in j of k_c (v_c - v̄_j)ᵀ

with w_j the probability of the summary. One matrix stands for all of them ("first"): the mean of
H_j over all tokens of the clip, times the probability of all summaries of the row.

Sources: PISA (arXiv:2602.01077) for the first order with one matrix; Sol-Attn (arXiv:2607.24027)
for means of dropped blocks inside the softmax.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nabla_attn.core.block_map import BlockMap
from nabla_attn.core.order import TokenLayout, block_order
from nabla_attn.core.scores import pool_blocks
from nabla_attn.core.window import build_segment_map
from nabla_attn.shapes import Bool, Float, Int

# Values of some heads, held in fp32 at once: 256 MB.
PANEL_VALUES = 2**26


@dataclass(frozen=True, eq=False)
class Tail:
    """Summaries of the video's blocks, one slot for each, filled up to whole blocks of slots.

    Text is always kept, so it has no summaries.

    Attributes:
        keys: Mean keys, fp32 or fp64; zero in empty slots.
        values: Mean values, likewise.
        bias: What is added to a summary's score: the logarithm of its tokens' number.
        shown: True where a query block attends a summary: the map drops the block, and it is of
            the query block's own clip.
        slopes: The mean of k (v - v̄)ᵀ over the tokens of each packed clip; None for a mean tail.
        clips: The clip of every query block; 0 for text.
    """

    keys: Float[Tensor, "batch heads summaries dim"]
    values: Float[Tensor, "batch heads summaries dim"]
    bias: Float[Tensor, " summaries"]
    shown: Bool[Tensor, "batch heads q_blocks summaries"]
    slopes: Float[Tensor, "batch heads clips dim dim"] | None
    clips: Int[Tensor, " q_blocks"]

    def of_heads(self, some: slice) -> "Tail":
        """The summaries of some heads."""
        return replace(
            self,
            keys=self.keys[:, some],
            values=self.values[:, some],
            shown=self.shown[:, some],
            slopes=None if self.slopes is None else self.slopes[:, some],
        )


def build_tail(
    k: Float[Tensor, "batch heads slots dim"],
    v: Float[Tensor, "batch heads slots dim"],
    block_map: BlockMap,
    layout: TokenLayout,
    kind: str,
) -> Tail:
    """Summaries of what a map drops, differentiable in k and v.

    Args:
        k: Keys in block order, zero in empty slots, any floating dtype.
        v: Values, like k.
        block_map: Which blocks are kept.
        layout: Where the tokens are.
        kind: "mean" or "first".
    """
    grid, missing = layout.grid, -layout.grid.num_blocks % layout.grid.block.tokens
    counts = block_order(layout, k.device).counts[: grid.num_blocks]
    keys, values = (_means(x[:, :, : grid.num_slots], counts) for x in (k, v))
    mask = block_map.mask[..., : grid.num_blocks]
    # Written in place: at 40 heads of 327,680 tokens it has a gigabyte.
    shown = mask.new_zeros((*mask.shape[:-1], grid.num_blocks + missing))
    torch.logical_not(mask, out=shown[..., : grid.num_blocks])
    if grid.segments is not None:
        # Rows of text drop nothing.
        shown[:, :, : grid.num_blocks, : grid.num_blocks] &= build_segment_map(grid, k.device)
    pad = torch.nn.functional.pad
    return Tail(
        keys=pad(keys, (0, 0, 0, missing)),
        values=pad(values, (0, 0, 0, missing)),
        bias=pad(counts.to(keys.dtype).log(), (0, missing)),
        shown=shown,
        slopes=_slopes(k, v, keys, values, layout) if kind == "first" else None,
        clips=_clips(layout, k.device),
    )


def tail_density(tail: Tail, block_map: BlockMap) -> Float[Tensor, "batch heads"]:
    """Scores of summaries / all token pairs, to be added to the density of the map."""
    scores = (tail.shown.sum(dim=-1) * block_map.q_counts).sum(dim=-1, dtype=torch.float64)
    pairs = block_map.q_counts.sum() * block_map.kv_counts.sum(dim=1, keepdim=True)
    return (scores / pairs).float()


def with_summaries(
    k: Tensor, v: Tensor, block_map: BlockMap, tail: Tail
) -> tuple[Tensor, Tensor, BlockMap]:
    """Keys, values and a map with the summaries behind the tokens, as blocks that all rows keep.

    Which of them a row attends is for `Tail.shown` to say.
    """
    k, v = (torch.cat([x, y.to(x.dtype)], dim=2) for x, y in ((k, tail.keys), (v, tail.values)))
    num_slots, valid = tail.bias.numel(), block_map.kv_valid
    mask = pad_true(block_map.mask, num_slots // block_map.block_tokens)
    valid = None if valid is None else pad_true(valid, num_slots)
    return k, v, replace(block_map, mask=mask, kv_valid=valid, order=None)


def pad_true(x: Bool[Tensor, "*rows columns"], count: int) -> Bool[Tensor, "*rows more_columns"]:
    """The rows with `count` columns of True behind them."""
    return torch.nn.functional.pad(x, (0, count), value=True)


def add_first_order(
    out: Float[Tensor, "batch heads rows dim"],
    mass: Float[Tensor, "batch heads rows"],
    q: Float[Tensor, "batch heads rows dim"],
    clips: Int[Tensor, " rows"],
    slopes: Float[Tensor, "batch heads clips dim dim"],
    scale: float,
) -> Float[Tensor, "batch heads rows dim"]:
    """The output of a mean tail with the first order added.

    Args:
        out: The output of the mean tail.
        mass: The probability of all summaries of a row.
        q: Its query.
        clips: Its clip.
        slopes: Those of the tail.
        scale: Factor on q.k.
    """
    slopes = slopes.to(q.dtype)
    rise = q @ slopes[:, :, 0]
    for clip in range(1, slopes.shape[2]):
        rise = torch.where((clips == clip)[:, None], q @ slopes[:, :, clip], rise)
    return torch.addcmul(out, (scale * mass).to(out.dtype)[..., None], rise.to(out.dtype))


def attend_rows(
    q: Float[Tensor, "batch heads rows dim"],
    k: Float[Tensor, "batch heads kv_slots dim"],
    v: Float[Tensor, "batch heads kv_slots dim"],
    keep: Bool[Tensor, "batch heads rows kv_slots"],
    *,
    blocks: Int[Tensor, " rows"],
    tail: Tail | None,
    scale: float,
) -> Float[Tensor, "batch heads rows dim"]:
    """The plain definition of attention over kept tokens and a tail, in the dtype of the inputs.

    Args:
        q: Queries, some or all.
        k: Keys in block order.
        v: Values, like k.
        keep: True where a query attends a token.
        blocks: The query block of every row.
        tail: The summaries, or None.
        scale: Factor on q.k.
    """
    scores = (scale * (q @ k.transpose(-1, -2))).masked_fill(~keep, float("-inf"))
    if tail is None:
        return scores.softmax(dim=-1) @ v
    keys, values = tail.keys.to(q.dtype), tail.values.to(q.dtype)
    summaries = scale * (q @ keys.transpose(-1, -2)) + tail.bias.to(q.dtype)
    summaries = summaries.masked_fill(~tail.shown[:, :, blocks], float("-inf"))
    probs = torch.cat([scores, summaries], dim=-1).softmax(dim=-1)
    kept, estimated = probs.split([k.shape[2], keys.shape[2]], dim=-1)
    out = kept @ v + estimated @ values
    if tail.slopes is None:
        return out
    return add_first_order(out, estimated.sum(-1), q, tail.clips[blocks], tail.slopes, scale)


def _means(x: Tensor, counts: Tensor) -> Tensor:
    """Means of blocks, a few heads at a time: a CPU copies what it sums into fp32."""
    heads = max(1, PANEL_VALUES // max(1, x[:, 0].numel()))
    return torch.cat([pool_blocks(part, counts) for part in x.split(heads, dim=1)], dim=1)


def _slopes(
    k: Tensor, v: Tensor, mean_k: Tensor, mean_v: Tensor, layout: TokenLayout
) -> Float[Tensor, "batch heads clips dim dim"]:
    """The mean of k (v - v̄)ᵀ over each clip's tokens; empty slots add nothing, as k is zero there.

    Products run in bf16 where tokens come in it, and in fp32 or fp64 elsewhere: sums over a clip
    would not fit fp16.
    """
    block = layout.grid.block.tokens
    dtype = k.dtype if k.dtype == torch.bfloat16 else mean_v.dtype
    counts = block_order(layout, k.device).counts[: layout.grid.num_blocks, None]
    per_time = layout.grid.num_blocks // layout.grid.blocks[0]
    per_frame = layout.grid.height * layout.grid.width
    blocks = [times * per_time for times in layout.grid.segment_blocks]
    tokens = [frames * per_frame for frames in layout.grid.segment_frames]
    heads = max(1, PANEL_VALUES // max(1, v[:, 0].numel()))
    parts = []
    for some in zip(*(x.split(heads, 1) for x in (k, v, mean_k, mean_v)), strict=True):
        keys, values = (x[:, :, : layout.grid.num_slots].to(dtype) for x in some[:2])
        centre = some[3].to(dtype)
        away = (values.unflatten(2, (-1, block)) - centre[..., None, :]).flatten(2, 3)
        sums = _products(keys, away, [count * block for count in blocks])
        if dtype != mean_v.dtype:
            # What rounding did to the centres of the blocks.
            off = _products(some[2] * counts, centre - some[3], blocks)
            sums = [x.to(mean_v.dtype) + y for x, y in zip(sums, off, strict=True)]
        parts.append(torch.stack([x / n for x, n in zip(sums, tokens, strict=True)], dim=2))
    return torch.cat(parts, dim=1)


def _products(x: Tensor, y: Tensor, lengths: list[int]) -> list[Tensor]:
    """xᵀ y over each of the pieces along the rows."""
    pieces = zip(x.split(lengths, 2), y.split(lengths, 2), strict=True)
    return [left.mT @ right for left, right in pieces]


def _clips(layout: TokenLayout, device: torch.device) -> Int[Tensor, " q_blocks"]:
    """The clip of every block; 0 for text."""
    per_time = layout.grid.num_blocks // layout.grid.blocks[0]
    clips = torch.zeros(layout.num_blocks, dtype=torch.long, device=device)
    start = 0
    for clip, times in enumerate(layout.grid.segment_blocks):
        clips[start : start + times * per_time] = clip
        start += times * per_time
    return clips
