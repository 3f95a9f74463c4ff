"""Orders of tokens that differ from head to head, cut into blocks: windows, clusters, axes.

`block_map.HeadOrder` holds one; here is how they come about. Heads are attended one by one in them.
"""

from functools import lru_cache
from math import sqrt

import torch
from torch import Tensor

from nabla_attn.core.block_map import HeadOrder
from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.order import tokens_in_order
from nabla_attn.core.token_orders import parse_order
from nabla_attn.shapes import Bool, Int


def head_order(tokens: Int[Tensor, "batch heads tokens"], block_tokens: int) -> HeadOrder:
    """Cut permutations of tokens into blocks, of which the last may have empty slots.

    Args:
        tokens: Raster index of the token at every position; leading axes of 1 stand for all.
        block_tokens: Slots of a block.
    """
    slots = torch.empty_like(tokens)
    slots.scatter_(-1, tokens, torch.arange(tokens.shape[-1]).to(tokens).expand_as(tokens))
    missing = -tokens.shape[-1] % block_tokens
    return HeadOrder(torch.nn.functional.pad(tokens, (0, missing), value=-1), slots)


@lru_cache(maxsize=32)
def named_order(name: str, grid: TokenGrid, device: torch.device) -> HeadOrder:
    """The video's tokens in an order of `token_orders`, for all samples and heads; cached."""
    with torch.inference_mode(False), torch.no_grad():
        tokens = tokens_in_order(grid, parse_order(name)).to(device)
        return head_order(tokens[None, None], grid.block.tokens)


def order_of_heads(names: list[str], grid: TokenGrid, device: torch.device) -> HeadOrder:
    """One named order for each head."""
    orders = [named_order(name, grid, device) for name in names]
    tokens, slots = ([getattr(x, side) for x in orders] for side in ("tokens", "slots"))
    return HeadOrder(torch.cat(tokens, dim=1), torch.cat(slots, dim=1))


@lru_cache(maxsize=32)
def band_of_blocks(
    num_tokens: int, block_tokens: int, share: float, device: torch.device
) -> Bool[Tensor, "blocks blocks"]:
    """Pairs of consecutive blocks so near that, about, a share of all pairs of tokens is kept.

    Always the diagonal; cached.
    """
    num_blocks = -(-num_tokens // block_tokens)
    # A band of width w keeps 1 - (1 - w / N)^2 of all pairs of N tokens.
    width = int(num_tokens * (1 - sqrt(1 - share)) * (1 + 1e-12)) // block_tokens
    width = num_blocks if share == 1 else max(1, width)
    with torch.inference_mode(False), torch.no_grad():
        at = torch.arange(num_blocks, device=device)
        return (at[:, None] - at).abs() < width


def grouped_order(
    groups: Int[Tensor, "batch heads tokens"], num_groups: int, block_tokens: int
) -> tuple[HeadOrder, Int[Tensor, "batch heads blocks"]]:
    """Bring the tokens of a group side by side, each group in as many blocks as it fills.

    Inside a group tokens keep raster order. Heads have as many blocks as the one that needs most;
    blocks that are left over are empty.

    Args:
        groups: The group of every token in raster order, from 0; leading axes of 1 stand for all.
        num_groups: Number of groups, of which some may have no token.
        block_tokens: Slots of a block.

    Returns:
        The order, and the group of every block; `num_groups` where a block is left over.
    """
    tokens = groups.argsort(dim=-1, stable=True)
    ordered = groups.gather(-1, tokens)
    counts = groups.new_zeros(*groups.shape[:-1], num_groups)
    counts.scatter_add_(-1, groups, torch.ones_like(groups))
    num_blocks = (counts + block_tokens - 1) // block_tokens
    ends = num_blocks.cumsum(dim=-1)
    # How far a token stands behind the first of its group, and that group's first slot.
    place = torch.arange(groups.shape[-1]).to(groups)
    place = place - (counts.cumsum(dim=-1) - counts).gather(-1, ordered)
    slots = (ends - num_blocks).gather(-1, ordered) * block_tokens + place
    total = int(ends[..., -1].max())
    filled = groups.new_full((*groups.shape[:-1], total * block_tokens), -1)
    filled.scatter_(-1, slots, tokens)
    order = HeadOrder(filled, torch.empty_like(slots).scatter_(-1, tokens, slots))
    blocks = torch.arange(total).to(groups).expand(*groups.shape[:-1], total)
    return order, torch.searchsorted(ends, blocks.contiguous(), right=True)


def mask_of_groups(
    kept: Bool[Tensor, "batch heads q_groups kv_groups"],
    q_groups: Int[Tensor, "batch heads q_blocks"],
    kv_groups: Int[Tensor, "batch heads kv_blocks"],
) -> Bool[Tensor, "batch heads q_blocks kv_blocks"]:
    """A map of groups as one of the blocks that `grouped_order` makes of them.

    Blocks that are left over are kept by none, and keep the first block.
    """
    num_q, num_kv = kept.shape[-2:]
    rows = q_groups.clamp_max(num_q - 1)[..., None].expand(-1, -1, -1, num_kv)
    columns = kv_groups.clamp_max(num_kv - 1)[..., None, :].expand(-1, -1, q_groups.shape[-1], -1)
    mask = kept.gather(2, rows).gather(3, columns)
    is_empty = (q_groups == num_q)[..., None]
    mask = mask & (kv_groups < num_kv)[..., None, :] & ~is_empty
    mask[..., :1] |= is_empty
    return mask
