"""What a block map loses, from exact attention on sampled query tokens."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nabla_attn.core.block_map import BlockMap
from nabla_attn.core.order import TokenLayout, block_order
from nabla_attn.core.scores import pool_blocks, score_blocks
from nabla_attn.core.tail import attend_rows, build_tail

MAX_SCORES = 2**26  # exact scores held at once: 256 MB in fp32


@dataclass(frozen=True)
class BlockCall:
    """One sample's attention call in block order, and its map.

    Attributes:
        q: Queries [1, heads, slots, dim].
        k: Keys, like q.
        v: Values, like q.
        layout: Where the tokens are.
        block_map: Which blocks are kept.
        scale: Factor on q.k.
        tail: How dropped blocks are estimated, "mean" or "first"; None leaves them out.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    layout: TokenLayout
    block_map: BlockMap
    scale: float
    tail: str | None = None


@torch.no_grad()
def pooled_scores(call: BlockCall) -> Tensor:
    """Probabilities of the pooled map of this call's tokens, fp32 [heads, blocks, blocks]."""
    grid = call.layout.grid
    counts = block_order(call.layout, call.q.device).counts[: grid.num_blocks]
    q, k = (pool_blocks(x[0, :, : grid.num_slots], counts) for x in (call.q, call.k))
    return score_blocks(q, k, scale=call.scale)


def pooled_mass(call: BlockCall) -> Tensor:
    """Mass of `pooled_scores` inside the kept blocks, mean over rows, fp32 [heads]."""
    count = call.layout.grid.num_blocks
    kept = call.block_map.mask[0, :, :count, :count]
    return torch.where(kept, pooled_scores(call), 0).sum(dim=-1).mean(dim=-1)


@dataclass(frozen=True)
class MapLosses:
    """Means over sampled query tokens, per head; fp32 [heads] on the CPU.

    Attributes:
        true_mass: Probability mass of exact attention inside the kept blocks.
        best_mass: The most that as many blocks, chosen for each token by exact attention, could
            hold: no map of this density keeps more.
        output_error: Distance of the sparse output, tail included, from the exact one over the
            length of the latter.
        squared_distance: That distance squared, not divided.
        squared_length: The squared length of the exact output.
    """

    true_mass: Tensor
    best_mass: Tensor
    output_error: Tensor
    squared_distance: Tensor
    squared_length: Tensor


@torch.no_grad()
def measure_losses(call: BlockCall, *, num_rows: int = 16, seed: int = 0) -> MapLosses:
    """Exact attention of sampled query tokens against what the map keeps of it.

    Keys of empty slots and padded text hold no mass, whatever their numbers are.

    Args:
        call: The call.
        num_rows: Query tokens sampled, the same for all heads; all of them when there are fewer.
        seed: Draws them.

    Raises:
        ValueError: The method reorders tokens head by head or changes the output otherwise.
    """
    if call.block_map.q_order is not None or call.block_map.treatment is not None:
        raise ValueError(
            "losses are measured of methods that choose blocks in one order of tokens and leave "
            "the output as it is; compare outputs of nabla_attention instead."
        )
    slots = _sample_slots(call.layout, num_rows, seed, call.q.device)
    block = call.block_map.block_tokens
    kept = call.block_map.mask[0][:, slots // block]
    valid = call.block_map.kv_valid
    heads, keys = call.q.shape[1], call.k.shape[2]
    step = max(1, MAX_SCORES // (len(slots) * keys))
    tail = None
    if call.tail is not None:
        tail = build_tail(call.k, call.v, call.block_map, call.layout, call.tail)
    parts = []
    for start in range(0, heads, step):
        some = slice(start, start + step)
        q, k, v = (x[0, some].float() for x in (call.q[:, :, slots], call.k, call.v))
        scores = (q * call.scale) @ k.transpose(-1, -2)
        if valid is not None:
            scores = scores.masked_fill(~valid[0], float("-inf"))
        sparse = None
        if tail is not None:
            keep = kept[some].repeat_interleave(block, dim=-1)
            keep = keep if valid is None else keep & valid[0]
            mine, blocks = tail.of_heads(some), slots // block
            rows = [x[None] for x in (q, k, v, keep)]
            sparse = attend_rows(*rows, blocks=blocks, tail=mine, scale=call.scale)[0]
        parts.append(_losses(scores.softmax(dim=-1), v, kept[some], block, sparse))
    return MapLosses(*(torch.cat(values).float().cpu() for values in zip(*parts, strict=True)))


def _losses(
    probs: Tensor, v: Tensor, kept: Tensor, block: int, sparse: Tensor | None
) -> tuple[Tensor, ...]:
    """Means over rows of probs [heads, rows, slots]; kept [heads, rows, blocks].

    The sparse output [heads, rows, dim] is given where there is a tail.
    """
    mass = probs.unflatten(-1, (-1, block)).sum(dim=-1)
    true_mass = (mass * kept).sum(dim=-1)
    counts = kept.sum(dim=-1, keepdim=True)
    highest = mass.sort(dim=-1, descending=True).values.cumsum(dim=-1)
    best_mass = highest.gather(-1, counts - 1).squeeze(-1)
    exact = probs @ v
    # Where the kept mass is below what floats hold, the output is nothing and its error 1.
    tiny = torch.finfo(probs.dtype).tiny
    if sparse is None:
        held = probs * kept.repeat_interleave(block, dim=-1)
        sparse = held @ v / true_mass.clamp(min=tiny)[..., None]
    distance, length = (sparse - exact).norm(dim=-1), exact.norm(dim=-1)
    error = distance / length.clamp(min=tiny)
    values = (true_mass, best_mass, error, distance.square(), length.square())
    return tuple(value.mean(dim=-1) for value in values)


def _sample_slots(layout: TokenLayout, count: int, seed: int, device: Any) -> Tensor:
    """Slots of randomly drawn video tokens."""
    tokens = layout.grid.num_tokens
    drawn = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))[:count]
    return block_order(layout, device).to_raster[drawn.to(device) + layout.text_before]
