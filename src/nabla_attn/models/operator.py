"""The attention operator: a planned layer's call of `attention.attend`.

It is opaque to the compiler, so graphs never break on it. FlexAttention stays compiled by this
package alone: uncompiled, it ignores the block map and silently computes dense attention.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from nabla_attn.attention import attend, autocast_dtype
from nabla_attn.block_selection import select_blocks
from nabla_attn.core.block_map import BlockMap
from nabla_attn.core.order import TokenLayout
from nabla_attn.models.context_parallel import gather_stats, gather_tokens, to_heads, to_tokens
from nabla_attn.models.plan import Layer, Plan, plan_of


def attend_layer(
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
        layer: The layer, with the plan of this forward.
        q: Queries [batch, tokens, heads, dim], rotary embedding applied, raster order.
        k: Keys; fewer heads than q are repeated (grouped queries).
        v: Values, like k.
        text_valid: Bool, False where text is padding: [batch, text tokens], or [batch, tokens] of
            which only those of the text count.
        scale: Factor on q.k; None is 1/sqrt(dim).

    Returns:
        [batch, tokens, heads, dim], in autocast's dtype where it is on.

    Raises:
        ValueError: The tokens do not fit the grid.
    """
    if k.shape[2] != q.shape[2]:
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    current = layer.current
    assert current.key is not None
    run = _attend_op if torch.compiler.is_compiling() else _attend
    # Trained parts are arguments: a compiler, and the backward, see nothing else.
    weights: list[Tensor] = [p for name in current.methods for p in layer.parts[name].parameters()]
    # Asked for here: autocast is not seen from inside a compiled graph.
    dtype = autocast_dtype(q.device)
    tensors = (q, k, v, text_valid, current.key, current.order, current.hidden, weights)
    out, stats = run(*tensors, scale, dtype)
    if current.stats is not None:
        current.stats.copy_(stats)
    return out


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_valid: Tensor | None,
    key: Tensor,
    order: Tensor | None,
    hidden: Tensor | None,
    weights: list[Tensor],
    scale: float | None,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """The output of a planned call, and what `_stats` says of its heads."""
    return _follow(plan_of(key), q, k, v, text_valid, order, hidden, weights, scale, dtype)


def _follow(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_valid: Tensor | None,
    order: Tensor | None,
    hidden: Tensor | None,
    weights: Sequence[Tensor],
    scale: float | None,
    dtype: torch.dtype | None,
    *,
    is_replay: bool = False,
) -> tuple[Tensor, Tensor]:
    layout = plan.layout(q.shape[1])
    text = (layout.text_before, layout.text_after)
    if hidden is not None:
        hidden = _video_of(hidden, plan, q.shape[1])
    if plan.ranks is not None:
        q, k, v = (to_heads(x, plan.ranks, *text, order) for x in (q, k, v))
        hidden = None if hidden is None else gather_tokens(hidden, plan.ranks)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    parts: dict[str, dict[str, Tensor]] = {}
    for (method, name), weight in zip(plan.weights, weights, strict=True):
        parts.setdefault(method, {})[name] = weight
    run = partial(
        _run,
        text_valid=text_valid,
        hidden=hidden,
        parts=parts,
        scale=scale,
        dtype=dtype,
        is_replay=is_replay,
    )
    heads = _heads_of(plan, order, q.shape[1])
    if plan.groups:
        out, stats = _run_groups(_places(plan, heads), layout, run, q, k, v)
    else:
        out, stats = run(_for_heads(plan, heads), layout, q, k, v)
    out = out.transpose(1, 2)
    if plan.ranks is not None:
        out = to_tokens(out, plan.ranks, *text, order)
        stats = gather_stats(stats, plan.ranks, order)
    return out, stats


def _video_of(hidden: Tensor, plan: Plan, num_tokens: int) -> Tensor:
    """The hidden states of the video's tokens, of a call with `num_tokens` tokens.

    Raises:
        ValueError: They are those of other tokens.
    """
    layout = plan.layout(num_tokens)
    count = num_tokens - layout.text_before - layout.text_after
    given = hidden.shape[1]
    if given == count:
        return hidden
    before = {num_tokens: layout.text_before, count + plan.prefix: plan.prefix}.get(given)
    if before is None:
        raise ValueError(
            f"trained parts that take hidden states need those of {count} video tokens: got "
            f"{given}. Use another method in this model."
        )
    return hidden[:, before : before + count]


def _heads_of(plan: Plan, order: Tensor | None, count: int) -> Sequence[int]:
    """Which of the layer's heads the `count` heads of this rank are."""
    if plan.ranks is None:
        return range(count)
    first = plan.ranks.rank * count
    every = range(plan.ranks.count * count) if order is None else order.tolist()
    return every[first : first + count]


def _for_heads(plan: Plan, heads: Sequence[int]) -> Plan:
    """The plan of a call that has these heads, which its methods are told where it matters."""
    if plan.moment is None or (plan.ranks is None and not plan.heads):
        return plan
    return replace(plan, moment=replace(plan.moment, heads=tuple(heads)))


def _places(plan: Plan, heads: Sequence[int]) -> list[tuple[Plan, list[int]]]:
    """The plans of this rank's heads, and where these stand among them."""
    owner = {head: group for group in plan.groups for head in group.heads or ()}
    places: dict[Plan, list[int]] = {}
    for place, head in enumerate(heads):
        places.setdefault(owner[head], []).append(place)
    found = []
    for group, mine in places.items():
        named = tuple(heads[place] for place in mine)
        found.append((_for_heads(replace(group, heads=named), named), mine))
    return found


def _run_groups(
    places: list[tuple[Plan, list[int]]],
    layout: TokenLayout,
    run: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> tuple[Tensor, Tensor]:
    """Heads that share an algorithm as one call each; the output in the order of the heads."""
    found = []
    for group, heads in places:
        is_run = heads[-1] - heads[0] == len(heads) - 1
        index = slice(heads[0], heads[-1] + 1) if is_run else torch.tensor(heads, device=q.device)
        some = (x[:, index] for x in (q, k, v))
        found.append(run(group, replace(layout, grid=group.grid), *some))
    outs, stats = zip(*found, strict=True)
    if len(found) == 1:
        return outs[0], stats[0]
    order = torch.tensor([head for _, heads in places for head in heads], device=q.device)
    back = order.argsort()
    return torch.cat(outs, 1).index_select(1, back), torch.cat(stats, 1).index_select(1, back)


def _run(
    plan: Plan,
    layout: TokenLayout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    text_valid: Tensor | None,
    hidden: Tensor | None,
    parts: Mapping[str, Mapping[str, Tensor]],
    scale: float | None,
    dtype: torch.dtype | None,
    is_replay: bool,
) -> tuple[Tensor, Tensor]:
    """One algorithm on [batch, heads, tokens, dim]: the output, and what `_stats` says."""
    layer = None if plan.layer is None else plan.layer()
    out, block_map = attend(
        q,
        k,
        v,
        layout,
        plan.config,
        backend=plan.backend,
        scale=scale,
        text_valid=text_valid,
        measure=plan.telemetry,
        dtype=dtype,
        is_block_order=plan.is_block_order,
        parts=parts,
        hidden=hidden,
        select=_select(plan, layer, q.shape[0], is_replay=is_replay),
    )
    if layer is not None and block_map is not None and not is_replay:
        layer.show(plan, q, k, v, layout, block_map, text_valid=text_valid, scale=scale)
    return out, _stats(plan, block_map, q)


def _select(
    plan: Plan, layer: Layer | None, batch: int, *, is_replay: bool
) -> Callable[..., BlockMap]:
    """What selects the blocks of a call: the layer's cache, where the schedule reuses maps."""
    if layer is None:
        return partial(select_blocks, moment=plan.moment)
    if plan.branch is not None:
        copies = 2 if batch == plan.guidance_batch and batch % 2 == 0 else 1
        kept_for = (plan.branch, plan.heads)
        return partial(layer.maps.select, kept_for=kept_for, copies=copies, moment=plan.moment)
    memory = None if plan.memory is None or is_replay else layer.memory(*plan.memory, plan.heads)
    return partial(select_blocks, moment=plan.moment, memory=memory, tables=layer.tables)


@torch.no_grad()
def _stats(plan: Plan, block_map: BlockMap | None, q: Tensor) -> Tensor:
    """Density, kept mass and the tail's density of every head; stays on the device.

    They are means over the batch.

    The kept mass is NaN under a map from an earlier call, whose scores were not computed.
    """
    if block_map is None:
        stats = torch.ones((3, q.shape[1]), device=q.device)
        stats[2] = 0
        return stats
    if not plan.telemetry:
        return torch.empty((3, q.shape[1]), device=q.device)
    density = block_map.head_density.mean(dim=0)
    mass = block_map.kept_mass
    kept = torch.full_like(density, float("nan")) if mass is None else mass.nanmean(dim=0).float()
    tail = block_map.tail_density
    extra = torch.zeros_like(density) if tail is None else tail.mean(dim=0)
    return torch.stack([density, kept, extra])


@torch.library.custom_op("nabla_attn::attend", mutates_args=())
@wraps(_attend)
def _attend_op(*args: Any, **kwargs: Any) -> Any:
    out, stats = _attend(*args, **kwargs)
    # One layout for every plan; models join the heads next, which would copy anyway.
    return out.contiguous(), stats


@_attend_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    # Autocast leaves float64 alone.
    dtype = q.dtype if q.dtype == torch.float64 else rest[-1] or q.dtype
    out = q.new_empty((batch, tokens, heads, v.shape[-1]), dtype=dtype)
    return out, q.new_empty((3, heads), dtype=torch.float32)


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
    hidden: Tensor | None,
    weights: list[Tensor],
    scale: float | None,
    dtype: torch.dtype | None,
) -> list[Tensor]:
    """Gradients of q, k, v, the hidden states where there are some, and the weights."""
    # The operator is opaque, so its inner graph is gone by now: run it again, with gradients.
    with torch.enable_grad(), _above_autograd():
        inputs = [x.detach().requires_grad_() for x in _learning(q, k, v, hidden, weights)]
        (q, k, v), weights = inputs[:3], inputs[len(inputs) - len(weights) :]
        hidden = None if hidden is None else inputs[3]
        plan = plan_of(key)
        tensors = (q, k, v, text_valid, order, hidden, weights)
        out, _ = _follow(plan, *tensors, scale, dtype, is_replay=True)
    found = torch.autograd.grad(out, inputs, grad, materialize_grads=True)
    return [x.contiguous() for x in found]


@_attend_backward.register_fake
def _(grad: Tensor, *inputs: Any) -> list[Tensor]:
    q, k, v, _, _, _, hidden, weights, *_ = inputs
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in _learning(q, k, v, hidden, weights)
    ]


def _learning(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, weights: Sequence[Tensor]
) -> list[Tensor]:
    """The arguments that have gradients."""
    return [q, k, v, *([] if hidden is None else [hidden]), *weights]


def _save_inputs(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    *tensors, weights, scale, dtype = inputs
    ctx.save_for_backward(*tensors, *weights)
    ctx.options = len(tensors), scale, dtype  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor) -> tuple:
    count, *options = ctx.options  # type: ignore[attr-defined]
    saved = ctx.saved_tensors  # type: ignore[attr-defined]
    tensors, weights = saved[:count], list(saved[count:])
    found = _attend_backward(grad, *tensors, weights, *options)
    hidden = None if tensors[-1] is None else found[3]
    return *found[:3], None, None, None, hidden, found[len(found) - len(weights) :], None, None


_attend_op.register_autograd(_backward, setup_context=_save_inputs)
