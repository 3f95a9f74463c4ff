"""FlexAttention, compiled once per shape class: the fast path on GPUs.

Uncompiled FlexAttention silently ignores the block indices, so nothing here runs it uncompiled.
"""

from dataclasses import replace
from functools import partial
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from nabla_attn.backends.flex_options import (
    LEAST_TILE,
    choose_options,
    needs_autotuning,
    why_not_tiles,
)
from nabla_attn.core.block_map import BlockMap
from nabla_attn.core.flex_tables import (
    FlexTables,
    build_block_mask,
    build_flex_tables,
    build_layout_tables,
)
from nabla_attn.core.tail import Tail, add_first_order, with_summaries
from nabla_attn.fusion import compiled, fused, why_not_compile
from nabla_attn.shapes import Float


def attend(
    q: Float[Tensor, "batch heads q_slots dim"],
    k: Float[Tensor, "batch heads kv_slots dim"],
    v: Float[Tensor, "batch heads kv_slots dim"],
    block_map: BlockMap,
    *,
    scale: float | None = None,
    tail: Tail | None = None,
) -> Float[Tensor, "batch heads q_slots dim"]:
    """Attention over the map's blocks and a tail.

    A new map of the same shape does not recompile.
    """
    if tail is None:
        return _run(q, k, v, block_map, scale)[0]
    if tail.slopes is None:
        return _run(q, *with_summaries(k, v, block_map, tail), scale, tail)[0]
    measure = _with_mass if q.device.type == "cpu" else _with_mass_by_lse
    out, mass = measure(q, k, v, block_map, scale, tail)
    clips = tail.clips.repeat_interleave(block_map.block_tokens)
    scale = 1 / sqrt(q.shape[-1]) if scale is None else scale
    return add_first_order(out, mass, q, clips, tail.slopes, scale)


def _with_mass(
    q: Tensor, k: Tensor, v: Tensor, block_map: BlockMap, scale: float | None, tail: Tail
) -> tuple[Tensor, Tensor]:
    """The output and the probability of a row's summaries, which one more value sums up."""
    num_slots, num_keys = k.shape[2], k.shape[2] + tail.bias.numel()
    k, v, block_map = with_summaries(k, v, block_map, tail)
    is_summary = (torch.arange(num_keys, device=v.device) >= num_slots).to(v.dtype)
    v = torch.cat([v, is_summary[:, None].expand(*v.shape[:3], 1)], dim=-1)
    out = _run(q, k, v, block_map, scale, tail)[0]
    return out[..., :-1], out[..., -1]


def _with_mass_by_lse(
    q: Tensor, k: Tensor, v: Tensor, block_map: BlockMap, scale: float | None, tail: Tail
) -> tuple[Tensor, Tensor]:
    """The output and the probability of a row's summaries, from two log-sum-exps.

    Triton would fill one more value up to twice as many; a second call over the summaries alone,
    with the fewest values that there can be, is 1 key for each block.
    """
    num_slots, num_blocks = k.shape[2], block_map.mask.shape[-1]
    k, v, block_map = with_summaries(k, v, block_map, tail)
    out, total = _run(q, k, v, block_map, scale, tail, has_lse=True)
    keys = k[:, :, num_slots:]
    alone = replace(block_map, mask=block_map.mask[..., num_blocks:], kv_valid=None)
    few = keys[..., :LEAST_TILE]
    summaries = _run(q, keys, few, alone, scale, tail, has_lse=True)[1]
    assert total is not None and summaries is not None
    return out, (summaries - total).exp()


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: BlockMap,
    scale: float | None,
    tail: Tail | None = None,
    *,
    has_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The output, and the log-sum-exp of every row if asked for; a tail's summaries are last."""
    needs_backward = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    block_tokens = block_map.block_tokens
    options = choose_options(q, block_tokens, needs_backward=needs_backward)
    shown = bias = None
    if tail is not None:
        shown = tail.shown
        bias = torch.nn.functional.pad(tail.bias, (k.shape[2] - tail.bias.numel(), 0))
    tables = _tables(block_map, options.tile_rows, needs_backward, shown)
    # flash-attn's kernels are generated for fixed sizes, and torch's kernel for CPUs mixes up the
    # names of more than ten sizes that vary.
    is_fixed = options.is_flash or (tail is not None and q.device.type == "cpu")
    autotunes = needs_backward and needs_autotuning(q, block_tokens)
    run = compiled(_attend, False if is_fixed else None, autotunes)
    kernel = options.kernel
    return run(q, k, v, tables, bias, block_tokens, options.tile_rows, kernel, scale, has_lse)


def _tables(
    block_map: BlockMap, tile_rows: int, needs_backward: bool, shown: Tensor | None
) -> FlexTables:
    """The map's tables: on a GPU one kernel reads the map and writes an index, without ranks.

    A CPU's kernel takes tables with a column for every key block only.
    """
    mask, order = block_map.mask, block_map.order
    facts = (mask, block_map.kv_valid, block_map.block_tokens)
    compile = partial(fused, num_elements=mask.numel(), device=mask.device)
    if mask.device.type != "cuda":
        return build_flex_tables(*facts, tile_rows, needs_backward, shown)
    if order is None or tile_rows > 1 or shown is not None:
        return compile(build_flex_tables)(*facts, tile_rows, needs_backward, shown)
    return build_layout_tables(*facts, order, needs_backward, compile)


def why_not(
    device: torch.device,
    *,
    needs_grad: bool = False,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
    block_tokens: int | None = None,
    tail: str | None = None,
) -> str | None:
    """The reason why FlexAttention cannot run, or None; arguments as for `backends.why_not`."""
    if device.type == "cpu" and needs_grad:
        return "FlexAttention has no backward on CPU"
    reason = why_not_compile(device)
    if reason is not None:
        return f"FlexAttention must be compiled, and {reason}"
    if device.type != "cuda":
        return None
    return why_not_tiles(
        dtype=dtype, head_dim=head_dim, block_tokens=block_tokens, needs_backward=needs_grad
    )


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: FlexTables,
    bias: Tensor | None,
    block_tokens: int,
    rows_per_tile: int,
    kernel_options: dict[str, Any],
    scale: float | None,
    has_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    if not torch.compiler.is_compiling():
        raise RuntimeError(
            "FlexAttention must be compiled, and torch.compile is switched off here, by "
            "torch.compiler.set_stance or a mode that watches operations. Use backend='gather'."
        )
    # The mask is built inside the compiled function so that its tensors are inputs, not guards.
    block_mask = build_block_mask(tables, block_tokens, rows_per_tile=rows_per_tile)
    options: Any = kernel_options or None

    def add_bias(score: Tensor, batch: Tensor, head: Tensor, q_slot: Tensor, kv: Tensor) -> Tensor:
        assert bias is not None
        return score + bias[kv]

    out: Any = flex_attention(
        q,
        k,
        v,
        score_mod=None if bias is None else add_bias,
        block_mask=block_mask,
        scale=scale,
        kernel_options=options,
        return_aux=AuxRequest(lse=True) if has_lse else None,
    )
    return (out[0], out[1].lse) if has_lse else (out, None)
