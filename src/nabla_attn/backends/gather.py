"""Gathered blocks in plain torch operations: forward and backward on any device.

Query blocks that keep the same number of key blocks form one batched product over their gathered
keys and values; on a CPU several products run side by side. Summaries of a tail are further blocks
of keys, which all query blocks gather and each sees a part of. Scratch memory is bounded by
`_max_scores`; the backward recomputes probabilities.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import floor, log2, sqrt

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nabla_attn.backends.scratch import Scratch
from nabla_attn.backends.workers import for_each, num_workers
from nabla_attn.core.block_map import BlockMap
from nabla_attn.core.tail import Tail, add_first_order, with_summaries
from nabla_attn.shapes import Float


def _l2_bytes() -> int:
    """Bytes of a core's L2 cache between 1 and 4 MB; 1 MB where PyTorch does not say."""
    ask = getattr(torch.cpu, "get_capabilities", None)
    size = ask().get("l2_cache_size") if ask is not None else None
    return min(max(int(size or 0), 2**20), 2**22)


# Bytes of one batched product's scores: on a CPU they fit the L2 cache of a core.
CPU_BYTES_PER_THREAD = _l2_bytes()
MAX_BYTES_ELSEWHERE = 2**27
# Keys of some heads with a tail, copied at once: 128 MB in types of two bytes.
PANEL_VALUES = 2**26


def attend(
    q: Float[Tensor, "batch heads q_slots dim"],
    k: Float[Tensor, "batch heads kv_slots dim"],
    v: Float[Tensor, "batch heads kv_slots dim"],
    block_map: BlockMap,
    *,
    scale: float | None = None,
    tail: Tail | None = None,
) -> Float[Tensor, "batch heads q_slots dim"]:
    """Attention over the map's blocks and a tail, in the inputs' dtype with an fp32 softmax."""
    scale = 1 / sqrt(q.shape[-1]) if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        if tail is None:
            return _GatherAttention.apply(q, k, v, block_map, scale, None)[0]
        # Keys and values are copied to stand before the summaries: a few heads at a time.
        heads = max(1, PANEL_VALUES // max(1, k[:, 0].numel()))
        if heads >= q.shape[1]:
            return _attend_with_tail(q, k, v, block_map, scale, tail)
        needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        out = None if needs_grad else torch.empty_like(q)
        parts = []
        for start in range(0, q.shape[1], heads):
            some = slice(start, start + heads)
            few, own = replace(block_map, mask=block_map.mask[:, some]), tail.of_heads(some)
            part = _attend_with_tail(q[:, some], k[:, some], v[:, some], few, scale, own)
            if out is None:
                parts.append(part)
            else:
                out[:, some] = part
        return torch.cat(parts, dim=1) if out is None else out


def _attend_with_tail(
    q: Tensor, k: Tensor, v: Tensor, block_map: BlockMap, scale: float, tail: Tail
) -> Tensor:
    k, v, block_map = with_summaries(k, v, block_map, tail)
    out, mass = _GatherAttention.apply(q, k, v, block_map, scale, tail)
    if tail.slopes is None:
        return out
    clips = tail.clips.repeat_interleave(block_map.block_tokens)
    return add_first_order(out, mass, q, clips, tail.slopes, scale)


@dataclass(frozen=True)
class _Bucket:
    """Query blocks with equally many kept key blocks, as rows of the flattened block tables."""

    rows: Tensor  # [group]
    columns: Tensor  # [group * kept]
    key_bias: Tensor | None  # [group, 1, kept * block_tokens], -inf at keys that are not valid
    tail_bias: Tensor | None  # [group, 1, summaries], -inf at summaries that are not shown


class _Buckets:
    """All rows of some heads that keep a key block, in the order of how many they keep.

    Heads are counted over all samples.
    """

    def __init__(
        self,
        block_map: BlockMap,
        dtype: torch.dtype,
        tail: Tail | None,
        some_heads: slice = slice(None),
    ) -> None:
        _, heads, q_blocks, kv_blocks = block_map.mask.shape
        mask = block_map.mask.flatten(0, 1)[some_heads].flatten(0, 1)
        counts = mask.sum(dim=1)
        # Rows of one head stay together: they read the same keys.
        order = counts.argsort(stable=True)
        self._rows = order + (some_heads.start or 0) * q_blocks
        row, column = mask[order].nonzero(as_tuple=True)
        head = self._rows[row] // q_blocks
        self._columns = column + head * kv_blocks
        self._bias = _key_bias(block_map, dtype)
        self._tail = None if tail is None else (tail.shown.flatten(0, 2), tail.bias.to(dtype))
        is_own = self._bias is not None and self._bias.shape[0] > kv_blocks
        self._keys = column + (head // heads) * kv_blocks if is_own else column
        max_scores = _max_scores(mask.device, dtype)
        # Long rows first: threads that share the work end together.
        self.slices = list(self._cut(counts, max_scores // block_map.block_tokens**2))[::-1]

    def _cut(self, counts: Tensor, max_blocks: int) -> Iterator[tuple[slice, slice]]:
        """Rows and the columns they keep, at most `max_blocks` of them if rows are more than 1."""
        sizes = torch.unique(counts, return_counts=True)
        row = column = 0
        for kept, group in zip(*(x.tolist() for x in sizes), strict=True):
            end, step = row + group, max(1, max_blocks // max(1, kept))
            while row < end:
                rows = min(step, end - row)
                if kept > 0:
                    yield slice(row, row + rows), slice(column, column + rows * kept)
                row, column = row + rows, column + rows * kept

    def bucket(self, rows: slice, columns: slice) -> _Bucket:
        key_bias = tail_bias = None
        if self._bias is not None:
            bias = self._bias.index_select(0, self._keys[columns])
            key_bias = bias.view(rows.stop - rows.start, 1, -1)
        if self._tail is not None:
            shown, bias = self._tail
            mine = shown.index_select(0, self._rows[rows])
            tail_bias = torch.where(mine, bias, float("-inf"))[:, None]
        return _Bucket(self._rows[rows], self._columns[columns], key_bias, tail_bias)


def _max_scores(device: torch.device, dtype: torch.dtype) -> int:
    """Scores of one batched product."""
    if device.type == "cpu":
        return CPU_BYTES_PER_THREAD // dtype.itemsize
    return MAX_BYTES_ELSEWHERE // dtype.itemsize


def _key_bias(block_map: BlockMap, dtype: torch.dtype) -> Tensor | None:
    """[samples * kv_blocks, block_tokens]: 0 at valid keys, -inf elsewhere."""
    if block_map.kv_valid is None:
        return None
    valid = block_map.kv_valid.reshape(-1, block_map.block_tokens)
    return torch.zeros_like(valid, dtype=dtype).masked_fill_(~valid, float("-inf"))


class _GatherAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block_map: BlockMap,
        scale: float,
        tail: Tail | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The output, and the probability of a row's summaries where the tail asks for it."""
        block = block_map.block_tokens
        q_rows, k_rows, v_rows = (_as_rows(x, block) for x in (q, k, v))
        out = torch.zeros_like(q_rows)
        has_mass = tail is not None and tail.slopes is not None
        num_summaries = 0 if tail is None else tail.bias.numel()
        mass = out.new_zeros(out.shape[:2]) if has_mass else None

        buckets = _Buckets(block_map, q.dtype, tail)

        def attend_slice(part: tuple[slice, slice], scratch: Scratch) -> None:
            bucket = buckets.bucket(*part)
            queries = _take_blocks(q_rows, bucket.rows, scratch, "queries")
            keys = _gather(k_rows, bucket, scratch, "keys or values")
            probs = _probabilities(queries, keys, bucket, scale, scratch)
            # The gathered keys are done with: one piece of memory stays in the cache.
            values = _gather(v_rows, bucket, scratch, "keys or values")
            result = torch.bmm(probs, values, out=queries)
            out.index_copy_(0, bucket.rows, result)
            if mass is not None:
                mass.index_copy_(0, bucket.rows, probs[..., -num_summaries:].sum(dim=-1))

        for_each(attend_slice, buckets.slices, q.device)
        out = out.view(q.shape)
        mass = None if mass is None else mass.view(q.shape[:3])
        ctx.save_for_backward(q, k, v, out, mass)  # type: ignore[arg-type]
        ctx.block_map, ctx.scale, ctx.tail = block_map, scale, tail  # type: ignore[attr-defined]
        return out, mass

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[no-untyped-def]
        ctx, grad_out: Tensor, grad_mass: Tensor
    ) -> tuple[Tensor | None, ...]:
        q, k, v, out, mass = ctx.saved_tensors
        block_map, scale, tail = ctx.block_map, ctx.scale, ctx.tail
        block = block_map.block_tokens
        q_rows, k_rows, v_rows, g_rows = (_as_rows(x, block) for x in (q, k, v, grad_out))
        # Keys and values collect from many rows: accumulate in fp32.
        accumulate = torch.promote_types(q.dtype, torch.float32)
        grad_q = torch.zeros_like(q_rows)
        grad_k, grad_v = (torch.zeros_like(x, dtype=accumulate) for x in (k_rows, v_rows))
        inner = (g_rows.to(accumulate) * _as_rows(out, block).to(accumulate)).sum(-1, keepdim=True)
        if mass is not None:
            g_mass = grad_mass.reshape(-1, block, 1).to(accumulate)
            inner += g_mass * mass.reshape(-1, block, 1).to(accumulate)
            g_mass = (scale * g_mass).to(q.dtype)
        inner = (scale * inner).to(q.dtype)

        def differentiate(heads: slice, scratch: Scratch) -> None:
            buckets = _Buckets(block_map, q.dtype, tail, heads)
            for part in buckets.slices:
                bucket = buckets.bucket(*part)
                queries = _take_blocks(q_rows, bucket.rows, scratch, "queries")
                grad = _take_blocks(g_rows, bucket.rows, scratch, "grad")
                keys = _gather(k_rows, bucket, scratch, "keys")
                values = _gather(v_rows, bucket, scratch, "values")
                probs = _probabilities(queries, keys, bucket, scale, scratch)
                grad_scores = _scaled_product(grad, values, scale, scratch, "grad_scores")
                if mass is not None:
                    grad_scores[..., -tail.bias.numel() :] += g_mass[bucket.rows]
                grad_scores.sub_(inner[bucket.rows]).mul_(probs)
                # The gathered values are done with: their memory takes what keys and values get.
                share = torch.bmm(probs.transpose(1, 2), grad, out=values)
                _scatter_add(grad_v, bucket, share, scratch)
                share = torch.bmm(grad_scores.transpose(1, 2), queries, out=values)
                _scatter_add(grad_k, bucket, share, scratch)
                grad_q.index_copy_(0, bucket.rows, torch.bmm(grad_scores, keys, out=grad))

        # Heads share no keys: whatever runs side by side, sums keep their order.
        num_heads = block_map.mask[:, :, 0, 0].numel()
        each = -(-num_heads // num_workers(q.device))
        heads = [slice(start, start + each) for start in range(0, num_heads, each)]
        for_each(differentiate, heads, q.device)
        grads = (grad_q.view(q.shape), grad_k.to(k.dtype).view(k.shape), grad_v.to(v.dtype))
        return *grads[:2], grads[2].view(v.shape), None, None, None


def _as_rows(x: Tensor, block: int) -> Tensor:
    """[batch, heads, slots, dim] -> [batch * heads * blocks, block tokens, dim]."""
    return x.reshape(-1, block, x.shape[-1])


def _take_blocks(rows: Tensor, index: Tensor, scratch: Scratch, name: str) -> Tensor:
    """[blocks, block tokens, dim]: the blocks of the index, valid until the name is taken again."""
    blocks = scratch.take(name, (len(index), *rows.shape[1:]), rows.dtype)
    return torch.index_select(rows, 0, index, out=blocks)


def _gather(rows: Tensor, bucket: _Bucket, scratch: Scratch, name: str) -> Tensor:
    """[group, kept * block tokens, dim] of the bucket's key blocks."""
    blocks = _take_blocks(rows, bucket.columns, scratch, name)
    return blocks.view(len(bucket.rows), -1, rows.shape[-1])


def _probabilities(
    queries: Tensor, keys: Tensor, bucket: _Bucket, scale: float, scratch: Scratch
) -> Tensor:
    """[group, block tokens, kept * block tokens]: every query's probabilities of its keys."""
    scores = _scaled_product(queries, keys, scale, scratch, "scores")
    if bucket.key_bias is not None:
        scores.add_(bucket.key_bias)
    if bucket.tail_bias is not None:
        # The summaries are the last keys of every row.
        scores[..., -bucket.tail_bias.shape[-1] :].add_(bucket.tail_bias)
    # A CPU reads a whole row before it writes it, so a row's scores can turn into probabilities.
    is_in_place = scores.device.type == "cpu"
    probs = scores if is_in_place else scratch.take("probs", tuple(scores.shape), scores.dtype)
    return torch.softmax(scores, dim=-1, out=probs)


def _scaled_product(
    queries: Tensor, keys: Tensor, scale: float, scratch: Scratch, name: str
) -> Tensor:
    """[group, queries, keys]: scale * queries @ keysᵀ, valid until the name is taken again."""
    # A CPU rounds to fp16, which ends at 65,504, before alpha scales: a power of two goes first.
    early = 2.0 ** floor(log2(abs(scale))) if queries.dtype == torch.float16 and scale else 1.0
    queries = queries if early == 1 else queries.mul(early)
    out = scratch.take(name, (*queries.shape[:2], keys.shape[1]), queries.dtype)
    return torch.baddbmm(out, queries, keys.mT, beta=0, alpha=scale / early, out=out)


def _scatter_add(total: Tensor, bucket: _Bucket, grad: Tensor, scratch: Scratch) -> None:
    blocks = grad.view(-1, *total.shape[1:])
    if blocks.dtype != total.dtype:
        blocks = scratch.take("wide", blocks.shape, total.dtype).copy_(blocks)
    total.index_add_(0, bucket.columns, blocks)
