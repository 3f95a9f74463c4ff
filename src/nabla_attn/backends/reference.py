"""Dense masked softmax in fp32 or fp64: the definition of correct, on any device."""

from math import sqrt

import torch
from torch import Tensor

from nabla_attn.core.block_map import BlockMap
from nabla_attn.core.tail import Tail, attend_rows
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
    """Attention over the map's token pairs and a tail; memory grows with slots squared."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = 1 / sqrt(q.shape[-1]) if scale is None else scale
    block = block_map.block_tokens
    with torch.autocast(q.device.type, enabled=False):
        keep = block_map.mask.repeat_interleave(block, -1).repeat_interleave(block, -2)
        if block_map.kv_valid is not None:
            keep = keep & block_map.kv_valid[:, None, None, :]
        blocks = torch.arange(block_map.mask.shape[2], device=q.device).repeat_interleave(block)
        q_wide, k_wide, v_wide = (x.to(dtype) for x in (q, k, v))
        out = attend_rows(q_wide, k_wide, v_wide, keep, blocks=blocks, tail=tail, scale=scale)
        return out.to(q.dtype)
