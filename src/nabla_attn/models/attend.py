"""The attention call of a planned layer: one opaque operator, so compiled graphs never break on it.

FlexAttention stays compiled by this package alone: uncompiled, it ignores the block map and
silently computes dense attention.
"""

from contextlib import AbstractContextManager
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nabla_attn import backends
from nabla_attn.core.block_map import BlockMap
from nabla_attn.core.order import TokenLayout, to_blocks, to_raster
from nabla_attn.models.maps import map_of
from nabla_attn.models.parallel import gather_stats, to_heads, to_tokens
from nabla_attn.models.plan import Layer, Plan, plan_of


def attend(
    layer: Layer,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    text_valid: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Run a layer's plan on q, k, v in diffusers' layout.

    Args:
        layer: the layer, with the plan of this forward.
        q: queries [batch, tokens, heads, dim], rotary embedding applied, raster order.
        k: keys; fewer heads than q are repeated (grouped queries).
        v: values, like k.
        text_valid: bool, False where text is padding: [batch, text tokens], or [batch, tokens] of
            which only those of the text count.
        scale: factor on q.k; None is 1/sqrt(dim).

    Returns:
        [batch, tokens, heads, dim].

    Raises:
        ValueError: the tokens do not fit the grid.
    """
    if k.shape[2] != q.shape[2]:
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    assert layer.key is not None
    run = _attend_op if torch.compiler.is_compiling() else _attend
    out, stats = run(q, k, v, text_valid, layer.key, layer.order, scale)
    if layer.stats is not None:
        layer.stats.copy_(stats)
    if layer.observer is not None:
        layer.observer(layer, q, k, v, text_valid, scale)
    return out


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_valid: Tensor | None,
    key: Tensor,
    order: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    plan = plan_of(key)
    before, after = plan.text_tokens(q.shape[1])
    layout = TokenLayout(plan.grid, before, after)
    text_valid = _text_part(text_valid, layout)
    if plan.ranks is None:
        return _attend_here(q, k, v, text_valid, plan, layout, scale)
    q, k, v = (to_heads(x, plan.ranks, before, after, order) for x in (q, k, v))
    out, stats = _attend_here(q, k, v, text_valid, plan, layout, scale)
    stats = gather_stats(stats, plan.ranks, order)
    return to_tokens(out, plan.ranks, before, after, order), stats


def _attend_here(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_valid: Tensor | None,
    plan: Plan,
    layout: TokenLayout,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention over whole sequences [batch, tokens, heads, dim], and its statistics."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if plan.config.is_dense and plan.grid.segments is None:
        out = _dense(q, k, v, text_valid, layout, scale)
        return out.transpose(1, 2), torch.ones((2, q.shape[1]), device=q.device)
    run = backends.resolve(plan.backend, q, k, v, block_tokens=layout.grid.block.tokens)
    if not plan.in_block_order:
        q, k, v = (to_blocks(x, layout) for x in (q, k, v))
    block_map = map_of(plan, q, k, layout, text_valid=text_valid, scale=scale)
    out = run(q, k, v, block_map, scale=scale)
    if not plan.in_block_order:
        out = to_raster(out, layout)
    stats = _stats(block_map) if plan.telemetry else q.new_empty((2, q.shape[1])).float()
    return out.transpose(1, 2), stats


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_valid: Tensor | None,
    layout: TokenLayout,
    scale: float | None,
) -> Tensor:
    """Dense attention behind padded text, [batch, heads, tokens, dim]."""
    mask = None
    if text_valid is not None:
        mask = text_valid.new_ones(text_valid.shape[0], layout.num_tokens, dtype=torch.bool)
        mask[:, : layout.text_before] = text_valid[:, : layout.text_before]
        mask[:, layout.num_tokens - layout.text_after :] = text_valid[:, layout.text_before :]
        mask = mask[:, None, None, :]
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _text_part(valid: Tensor | None, layout: TokenLayout) -> Tensor | None:
    """Validity of the text tokens alone."""
    if valid is None:
        return None
    if layout.num_text == 0:
        raise ValueError(
            "a mask over video tokens cannot be combined with block-sparse attention. Pass no "
            "attention_mask for the video, or make the layers dense in the schedule."
        )
    if valid.shape[1] != layout.num_tokens:
        return valid
    after = layout.num_tokens - layout.text_after
    return torch.cat([valid[:, : layout.text_before], valid[:, after:]], dim=1)


@torch.no_grad()
def _stats(block_map: BlockMap) -> Tensor:
    """Density and kept mass of every head, averaged over the batch; stays on the device.

    The kept mass is NaN under a map from an earlier call, whose scores were not computed.
    """
    density = block_map.head_density.mean(dim=0)
    mass = block_map.kept_mass
    kept = torch.full_like(density, float("nan")) if mass is None else mass.nanmean(dim=0).float()
    return torch.stack([density, kept])


@torch.library.custom_op("nabla_attn::attend", mutates_args=())
@wraps(_attend)
def _attend_op(*args: Any, **kwargs: Any) -> Any:
    out, stats = _attend(*args, **kwargs)
    # One layout for every plan; models join the heads next, which would copy anyway.
    return out.contiguous(), stats


@_attend_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    out = q.new_empty(batch, tokens, heads, v.shape[-1])
    return out, q.new_empty((2, heads), dtype=torch.float32)


def _above_autograd() -> AbstractContextManager:
    """Operators run below autograd; a graph inside one needs it back."""
    include = torch._C._dispatch_tls_local_include_set()
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for name in ("AutogradFunctionality", "AutogradOther", "ADInplaceOrView"):
        exclude = exclude.remove(getattr(torch._C.DispatchKey, name))
    return torch._C._ForceDispatchKeyGuard(include, exclude)


@torch.library.custom_op("nabla_attn::attend_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_valid: Tensor | None,
    key: Tensor,
    order: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    # The operator is opaque, so its inner graph is gone by now: run it again, with gradients.
    with torch.enable_grad(), _above_autograd():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        out, _ = _attend(q, k, v, text_valid, key, order, scale)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_attend_backward.register_fake
def _(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    # Of q, k and v.
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs[:3])


def _save_inputs(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    q, k, v, text_valid, key, order, scale = inputs
    ctx.save_for_backward(q, k, v, text_valid, key, order)
    ctx.scale = scale  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor) -> tuple:
    gradients = _attend_backward(grad, *ctx.saved_tensors, ctx.scale)  # type: ignore[attr-defined]
    return *gradients, None, None, None, None


_attend_op.register_autograd(_backward, setup_context=_save_inputs)
