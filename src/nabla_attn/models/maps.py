"""The map of a planned call: built from its tokens, or kept from an earlier call."""

from collections.abc import Hashable

import torch
from torch import Tensor

from nabla_attn.core.block_map import BlockMap, block_map_of
from nabla_attn.core.order import TokenLayout
from nabla_attn.mapping import map_blocks
from nabla_attn.models.map_memory import MapMemory
from nabla_attn.models.plan import Plan


def map_of(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    layout: TokenLayout,
    *,
    text_valid: Tensor | None = None,
    scale: float | None = None,
) -> BlockMap:
    """The map that a call uses; new ones go to the layer's memory, where it has one.

    A kept map has no `kept_mass`, and one that the other half of the batch shares has NaN there.

    Args:
        plan: the call's plan.
        q: queries in block order [batch, heads, slots, dim].
        k: keys, like q.
        layout: where the tokens are.
        text_valid: bool [batch, text tokens], False at padding.
        scale: factor on q.k; None is 1/sqrt(dim).
    """
    batch = q.shape[0]
    memory = _memory(plan)
    kept = None if memory is None else _recall(memory, plan, batch, q.shape[1], q.device)
    if kept is not None:
        return block_map_of(kept, layout, text_valid)
    is_shared = _is_shared(plan, batch)
    chosen = slice(batch // 2 if is_shared else 0, None)
    block_map = map_blocks(
        q[chosen],
        k[chosen],
        layout,
        plan.config,
        scale=scale,
        text_valid=None if text_valid is None else text_valid[chosen],
        keep_first_frame=plan.keep_first_frame,
        pair_queries=plan.pair_queries,
        measure=plan.telemetry,
    )
    count = layout.grid.num_blocks
    video_mask = block_map.mask[:, :, :count, :count]
    if memory is not None:
        memory.keep(plan.branch, _origin(plan), video_mask)
    if not is_shared:
        return block_map
    mass = block_map.kept_mass
    if mass is not None:
        mass = torch.cat([torch.full_like(mass, float("nan")), mass])
    return block_map_of(video_mask.repeat(2, 1, 1, 1), layout, text_valid, kept_mass=mass)


def map_of_last_sample(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    layout: TokenLayout,
    batch: int,
    *,
    text_valid: Tensor | None = None,
    scale: float | None = None,
) -> BlockMap:
    """The map that the last sample of a call used, found again after it.

    Args:
        plan: the call's plan.
        q: queries of the last sample in block order [1, heads, slots, dim].
        k: keys, like q.
        layout: where the tokens are.
        batch: samples of the call.
        text_valid: of the last sample, as in `map_of`.
        scale: as in `map_of`.
    """
    memory = _memory(plan)
    kept = None if memory is None else _recall(memory, plan, batch, q.shape[1], q.device)
    if kept is not None:
        return block_map_of(kept[-1:], layout, text_valid)
    return map_blocks(
        q,
        k,
        layout,
        plan.config,
        scale=scale,
        text_valid=text_valid,
        keep_first_frame=plan.keep_first_frame,
        pair_queries=plan.pair_queries,
    )


def _recall(
    memory: MapMemory, plan: Plan, batch: int, heads: int, device: torch.device
) -> Tensor | None:
    copies = 2 if _is_shared(plan, batch) else 1
    kept = memory.recall(plan.branch, _origin(plan), batch // copies, heads, device)
    return None if kept is None else kept.repeat(copies, 1, 1, 1)


def _memory(plan: Plan) -> MapMemory | None:
    return None if plan.memory is None else plan.memory()


def _is_shared(plan: Plan, batch: int) -> bool:
    return plan.is_guidance_batch and batch % 2 == 0


def _origin(plan: Plan) -> Hashable:
    return plan.config, plan.grid, plan.keep_first_frame, plan.pair_queries
