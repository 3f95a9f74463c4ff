"""Attention of row blocks to single keys: exact sums of columns, and what all other keys add."""

from collections.abc import Callable

import torch
from torch import Tensor

from nabla_attn.shapes import Bool, Float, Int


@torch.no_grad()
def split_columns(
    out: Float[Tensor, "batch heads slots dim"],
    q: Float[Tensor, "batch heads slots dim"],
    k: Float[Tensor, "batch heads slots dim"],
    v: Float[Tensor, "batch heads slots dim"],
    lse: Float[Tensor, "batch heads slots"] | None,
    choose: Callable[[Tensor, int], Tensor],
    *,
    counts: Int[Tensor, " blocks"],
    block_tokens: int,
    valid: Bool[Tensor, "samples slots"] | None,
    scale: float,
) -> dict[str, Tensor]:
    """Split dense attention of each row block into that over chosen columns and the rest.

    A column's sum over the rows of a block is that of exp(score - lse), with the logarithms of an
    earlier call. Memory is bounded by one block of rows.

    Args:
        out: The dense output.
        q: Queries in block order, those of text behind the video's.
        k: Keys, like q.
        v: Values, like q.
        lse: What an earlier call returned as such; None returns nothing else.
        choose: From the sums of the video's columns [batch, heads, video slots] and the number of
            the row block to the kept columns, or key blocks.
        counts: Tokens of every block of the video.
        block_tokens: Slots of a block.
        valid: Keys that may be attended; None is all.
        scale: Factor on q.k.

    Returns:
        `lse`, the logarithm of each row's sum of exponentials; with an earlier one also `kept`,
        what `choose` returned [batch, heads, blocks, columns], and `rest`, the output less
        attention over kept columns and text [batch, heads, video slots, dim].
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    keys, values, num_slots = k.to(dtype).mT, v.to(dtype), len(counts) * block_tokens
    new, kept, rest = out.new_zeros(q.shape[:3], dtype=dtype), [], []
    with torch.autocast(q.device.type, enabled=False):
        for row, count in enumerate(counts.tolist()):
            at = slice(row * block_tokens, (row + 1) * block_tokens)
            scores = (q[:, :, at].to(dtype) * scale) @ keys
            if valid is not None:
                scores = scores.masked_fill_(~valid[:, None, None, :], float("-inf"))
            new[:, :, at] = scores.logsumexp(dim=-1)
            if lse is None:
                continue
            shares = (scores[:, :, :count] - lse[:, :, at, None][:, :, :count]).exp()
            chosen = choose(shares[..., :num_slots].sum(dim=2), row)
            kept.append(chosen)
            is_near = chosen.repeat_interleave(num_slots // chosen.shape[-1], dim=-1)
            is_near = torch.nn.functional.pad(is_near, (0, q.shape[2] - num_slots), value=True)
            scores = scores.masked_fill_(~is_near[:, :, None], float("-inf"))
            near = scores.softmax(dim=-1) @ values
            rest.append((out[:, :, at].to(dtype) - near).to(out.dtype))
    if lse is None:
        return {"lse": new}
    return {"lse": new, "kept": torch.stack(kept, dim=2), "rest": torch.cat(rest, dim=2)}


def order_of_columns(
    kept: Bool[Tensor, "batch heads blocks columns"], block_tokens: int
) -> tuple[Int[Tensor, "batch heads slots"], Bool[Tensor, "batch heads blocks kv_blocks"]]:
    """Kept columns of every row block in blocks of their own, and the map in which it attends them.

    Returns:
        The column of every slot, -1 where it is empty: as many blocks of slots for each row block
        as the fullest needs; and which of these blocks a row block attends.
    """
    rows = kept.shape[2]
    counts = kept.sum(dim=-1)
    width = -(-int(counts.max()) // block_tokens)
    # A stable sort brings kept columns to the front, in their order.
    front = (~kept).to(torch.int8).argsort(dim=-1, stable=True)[..., : width * block_tokens]
    front = torch.nn.functional.pad(front, (0, width * block_tokens - front.shape[-1]))
    place = torch.arange(width * block_tokens, device=kept.device)
    columns = torch.where(place < counts[..., None], front, -1)
    is_filled = columns.unflatten(-1, (width, block_tokens)).amax(dim=-1) >= 0
    own = torch.eye(rows, dtype=torch.bool, device=kept.device)[None, None, :, :, None]
    return columns.flatten(2), (own & is_filled[:, :, None]).flatten(3)
