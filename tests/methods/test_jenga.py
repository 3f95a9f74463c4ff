import math

import pytest
import torch
from tests.oracle import random_qkv

import nabla_attn as na
from nabla_attn.core.order import to_blocks
from nabla_attn.core.token_orders import parse_order

GRIDS = {
    "whole": na.TokenGrid(4, 8, 8, block=na.BlockShape(1, 4, 4)),
    "ragged": na.TokenGrid(3, 11, 13, block=na.BlockShape(1, 4, 4)),
    "one frame": na.TokenGrid(1, 9, 7, block=na.BlockShape(1, 3, 3)),
    "clips": na.TokenGrid(5, 6, 7, segments=(3, 2), block=na.BlockShape(1, 4, 4)),
}


def block_of_tokens(grid):
    """The block of every raster token."""
    slots = to_blocks(torch.arange(1, grid.num_tokens + 1)[:, None], grid, dim=0).flatten()
    at = (slots > 0).nonzero().flatten()
    return torch.empty(grid.num_tokens, dtype=torch.long).scatter(
        0, slots[at] - 1, at // grid.block.tokens
    )


def touching(grid):
    blocks, sizes = block_of_tokens(grid), (grid.frames, grid.height, grid.width)
    clip = torch.repeat_interleave(torch.tensor(grid.segment_frames)).tolist()
    at = [(t, h, w) for t in range(sizes[0]) for h in range(sizes[1]) for w in range(sizes[2])]
    kept = torch.eye(grid.num_blocks).bool()
    for one, here in zip(at, blocks.tolist(), strict=True):
        for two, there in zip(at, blocks.tolist(), strict=True):
            is_near = all(abs(x - y) <= 1 for x, y in zip(one, two, strict=True))
            if is_near and clip[one[0]] == clip[two[0]]:
                kept[here, there] = True
    return kept


def chosen(q, k, grid, mass, floor):
    """The published rule, row by row, of true-size means."""
    blocks = block_of_tokens(grid)
    one = torch.nn.functional.one_hot(blocks, grid.num_blocks).double()
    means = [(one.T @ x) / one.sum(dim=0)[:, None] for x in (q, k)]
    scores = means[0] @ means[1].mT / math.sqrt(q.shape[-1])
    per_time = grid.num_blocks // grid.blocks[0]
    clip = torch.repeat_interleave(torch.tensor(grid.segment_blocks) * per_time)
    same = clip[:, None] == clip
    probs = scores.masked_fill(~same, -math.inf).softmax(dim=-1)
    kept = torch.zeros_like(probs, dtype=torch.bool)
    for index in torch.cartesian_prod(*map(torch.arange, probs.shape[:-1])).tolist():
        row = probs[tuple(index)].tolist()
        order = sorted(range(len(row)), key=lambda j: (-row[j], j))
        total, number = 0.0, 1
        for j in order:
            total += row[j]
            number += total <= mass
        for j in order[: max(number, int(floor * len(row)))]:
            kept[(*index, j)] = True
    return kept & same


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("order", [None, "gilbert", "slices-1"])
@pytest.mark.parametrize("mass, floor", [(0.3, 0.25), (0.8, 0.0)])
def test_map_equals_the_published_rule(name, order, mass, floor):
    grid = GRIDS[name]
    q, k, _ = random_qkv(grid, batch=2, dtype=torch.float64)
    suffix = "" if order is None else f"_order-{order}"
    found = na.build_block_map(q, k, grid, f"jenga-{mass}-{floor}{suffix}").mask
    ordered = grid.with_block(None, order and parse_order(order))
    assert torch.equal(found, chosen(q, k, ordered, mass, floor) | touching(ordered))


def test_ties_go_to_the_first_blocks():
    grid = na.TokenGrid(1, 4, 64, block=na.BlockShape(1, 4, 4))
    q = torch.zeros(1, 1, grid.num_tokens, 8, dtype=torch.float64)
    found = na.build_block_map(q, q, grid, "jenga-0.5-0").mask[0, 0]
    # Sixteen equal blocks: eight hold one half exactly, and one more is kept.
    expected = (torch.arange(16) < 9) | touching(grid)
    assert torch.equal(found, expected)


def test_first_frames_see_each_other():
    grid = na.TokenGrid(4, 8, 8, block=na.BlockShape(1, 4, 4))
    q, k, _ = random_qkv(grid)
    algorithm = "jenga-0.01-0-first_order-slices-1"
    found = na.build_block_map(q, k, grid, algorithm).mask
    assert found[..., :4, :4].all()
    free = na.build_block_map(q, k, grid, algorithm.replace("-first", "")).mask
    assert torch.equal(found[..., 4:, :], free[..., 4:, :])


def test_everything_is_kept_at_full_mass():
    grid = GRIDS["ragged"]
    q, k, _ = random_qkv(grid)
    assert na.build_block_map(q, k, grid, "jenga-1-0").density == 1
    assert na.build_block_map(q, k, grid, "jenga-0.01-1").density == 1
