"""FlexAttention, compiled once per shape class: the fast path on GPUs.

Uncompiled FlexAttention silently ignores the block indices, so nothing here runs it uncompiled.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from nabla_attn.backends.flex_options import choose_options, needs_autotuning
from nabla_attn.core.block_map import BlockMap, build_block_mask
from nabla_attn.fusion import compiled, why_not_compile
from nabla_attn.shapes import Float


def attend(
    q: Float[Tensor, "batch heads q_slots dim"],
    k: Float[Tensor, "batch heads kv_slots dim"],
    v: Float[Tensor, "batch heads kv_slots dim"],
    block_map: BlockMap,
    *,
    scale: float | None = None,
) -> Float[Tensor, "batch heads q_slots dim"]:
    """Attention over the map's blocks; a new map of the same shape does not recompile."""
    needs_backward = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    block_tokens = block_map.block_tokens
    options = choose_options(q, block_tokens, needs_backward=needs_backward)
    tables = block_map.flex_tables(options.tile_rows)
    # Whole tiles need no look into the map.
    mask = block_map.mask if options.tile_rows > 1 else None
    # flash-attn's kernels are generated for fixed sizes.
    autotunes = needs_backward and needs_autotuning(q.device, block_tokens)
    run = compiled(_attend, False if options.is_flash else None, autotunes)
    settings = (block_tokens, options.tile_rows, options.kernel)
    return run(q, k, v, *tables, mask, *settings, scale, needs_backward)


def why_not(device: torch.device, *, needs_grad: bool = False) -> str | None:
    """The reason why FlexAttention cannot run on `device`, or None."""
    if device.type == "cpu" and needs_grad:
        return "FlexAttention has no backward on CPU"
    reason = why_not_compile(device)
    return reason and f"FlexAttention must be compiled, and {reason}"


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    partial_counts: Tensor,
    partial_index: Tensor,
    full_counts: Tensor,
    full_index: Tensor,
    valid: Tensor,
    mask: Tensor | None,
    block_tokens: int,
    rows_per_tile: int,
    kernel_options: dict[str, Any],
    scale: float | None,
    needs_backward: bool,
) -> Tensor:
    if not torch.compiler.is_compiling():
        raise RuntimeError(
            "FlexAttention must be compiled, and torch.compile is switched off here, by "
            "torch.compiler.set_stance or a mode that watches operations. Use backend='gather'."
        )
    # The mask is built inside the compiled function so that its tensors are inputs, not guards.
    block_mask = build_block_mask(
        partial_counts,
        partial_index,
        full_counts,
        full_index,
        valid,
        block_tokens,
        rows_per_tile=rows_per_tile,
        mask=mask,
        needs_backward=needs_backward,
    )
    options: Any = kernel_options or None
    out = flex_attention(q, k, v, block_mask=block_mask, scale=scale, kernel_options=options)
    assert isinstance(out, Tensor)
    return out
