"""What block-sparse attention loses, from exact attention on sampled query tokens."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nabla_attn.config import SparseConfig
from nabla_attn.core.block_map import BlockMap
from nabla_attn.core.order import TokenLayout, block_order, to_blocks
from nabla_attn.core.scores import score_blocks
from nabla_attn.mapping import pool_video
from nabla_attn.models.maps import map_of_last_sample
from nabla_attn.models.modules import num_heads
from nabla_attn.models.plan import Layer, plan_of

MAX_SCORES = 2**26  # exact scores held at once: 256 MB in fp32


@dataclass(frozen=True)
class BlockCall:
    """One attention call in block order, and the map it used.

    Attributes:
        q: queries [batch, heads, slots, dim].
        k: keys, like q.
        v: values, like q.
        layout: where the tokens are.
        block_map: which blocks were kept.
        scale: factor on q.k.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    layout: TokenLayout
    block_map: BlockMap
    scale: float


def observe_layers(handle: Any, observe: Callable[..., None]) -> None:
    """Have ``observe(step, index, layer, *arguments)`` called after every sparse call.

    Args:
        handle: of the sparse attention; the layers of both transformers of Wan 2.2 are observed.
        observe: given the denoising step (None where it is not known), the layer's index, the
            layer, and the arguments of its observer.
    """

    def observer(index: int) -> Callable[..., None]:
        return lambda *call: observe(handle.telemetry.forwards[-1].step, index, *call)

    for _, state in handle.models:
        for index, layer in enumerate(state.layers):
            layer.observer = observer(index)


def layers_and_heads(handle: Any) -> tuple[int, int]:
    """The most layers of a handle's transformers, and the most heads of a layer."""
    modules = [list(state.modules.values()) for _, state in handle.models]
    return max(map(len, modules)), max(num_heads(module) for some in modules for module in some)


@torch.no_grad()
def block_call(
    layer: Layer,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_valid: Tensor | None,
    scale: float | None,
    *,
    config: SparseConfig | None = None,
) -> BlockCall:
    """Find the map of a call that a layer's observer saw; arguments as the observer's.

    Only the last sample of the batch is kept: under classifier-free guidance in one batch, it is
    the one with the prompt.

    Args:
        config: find the map that another algorithm would use.
    """
    assert layer.key is not None
    plan = plan_of(layer.key)
    if config is not None:
        plan = replace(plan.with_config(config), memory=None)
    layout = TokenLayout(plan.grid, *plan.text_tokens(q.shape[1]))
    batch = q.shape[0]
    q, k, v = (x[-1:].detach().transpose(1, 2) for x in (q, k, v))
    if not plan.in_block_order:
        q, k, v = (to_blocks(x, layout) for x in (q, k, v))
    valid = None if text_valid is None else _text_only(text_valid[-1:], layout)
    block_map = map_of_last_sample(plan, q, k, layout, batch, text_valid=valid, scale=scale)
    return BlockCall(q, k, v, layout, block_map, q.shape[-1] ** -0.5 if scale is None else scale)


def pooled_scores(call: BlockCall) -> Tensor:
    """Probabilities of the pooled map of this call's tokens, fp32 [heads, blocks, blocks]."""
    q, k = (pool_video(x, call.layout) for x in (call.q, call.k))
    return score_blocks(q, k, scale=call.scale)[0]


def pooled_mass(call: BlockCall) -> Tensor:
    """Mass of `pooled_scores` inside the kept blocks, mean over rows, fp32 [heads]."""
    count = call.layout.grid.num_blocks
    kept = call.block_map.mask[0, :, :count, :count]
    return torch.where(kept, pooled_scores(call), 0).sum(dim=-1).mean(dim=-1)


@dataclass(frozen=True)
class Losses:
    """Means over sampled query tokens, per head; fp32 [heads] on the CPU.

    Attributes:
        true_mass: probability mass of exact attention inside the kept blocks.
        best_mass: the most that as many blocks, chosen for each token by exact attention, could
            hold: no map of this density keeps more.
        output_error: distance of the sparse from the exact output over the length of the latter.
    """

    true_mass: Tensor
    best_mass: Tensor
    output_error: Tensor


@torch.no_grad()
def measure_losses(call: BlockCall, *, num_rows: int = 16, seed: int = 0) -> Losses:
    """Exact attention of sampled query tokens against what the map keeps of it.

    Keys of empty slots and padded text hold no mass, whatever their numbers are.

    Args:
        call: the call.
        num_rows: query tokens sampled, the same for all heads; all of them when there are fewer.
        seed: draws them.
    """
    slots = _sample_slots(call.layout, num_rows, seed, call.q.device)
    block = call.block_map.block_tokens
    kept = call.block_map.mask[0][:, slots // block]
    valid = call.block_map.kv_valid
    heads, keys = call.q.shape[1], call.k.shape[2]
    step = max(1, MAX_SCORES // (len(slots) * keys))
    parts = []
    for start in range(0, heads, step):
        some = slice(start, start + step)
        q, k, v = (x[0, some].float() for x in (call.q[:, :, slots], call.k, call.v))
        scores = (q * call.scale) @ k.transpose(-1, -2)
        if valid is not None:
            scores = scores.masked_fill(~valid[0], float("-inf"))
        parts.append(_losses(scores.softmax(dim=-1), v, kept[some], block))
    return Losses(*(torch.cat(values).float().cpu() for values in zip(*parts, strict=True)))


def _losses(probs: Tensor, v: Tensor, kept: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Means over rows of probs [heads, rows, slots]; kept [heads, rows, blocks]."""
    mass = probs.unflatten(-1, (-1, block)).sum(dim=-1)
    true_mass = (mass * kept).sum(dim=-1)
    counts = kept.sum(dim=-1, keepdim=True)
    highest = mass.sort(dim=-1, descending=True).values.cumsum(dim=-1)
    best_mass = highest.gather(-1, counts - 1).squeeze(-1)
    exact = probs @ v
    # Where the kept mass is below what floats hold, the output is nothing and its error 1.
    tiny = torch.finfo(probs.dtype).tiny
    sparse = (
        (probs * kept.repeat_interleave(block, dim=-1)) @ v / true_mass.clamp(min=tiny)[..., None]
    )
    error = (sparse - exact).norm(dim=-1) / exact.norm(dim=-1).clamp(min=tiny)
    return true_mass.mean(dim=-1), best_mass.mean(dim=-1), error.mean(dim=-1)


def _sample_slots(layout: TokenLayout, count: int, seed: int, device: Any) -> Tensor:
    """Slots of randomly drawn video tokens."""
    tokens = layout.grid.num_tokens
    drawn = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))[:count]
    return block_order(layout, device).to_raster[drawn.to(device) + layout.text_before]


def _text_only(valid: Tensor, layout: TokenLayout) -> Tensor | None:
    if layout.num_text == 0:
        return None
    if valid.shape[1] != layout.num_tokens:
        return valid
    after = layout.num_tokens - layout.text_after
    return torch.cat([valid[:, : layout.text_before], valid[:, after:]], dim=1)
