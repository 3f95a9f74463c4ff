import math

import pytest
import torch
from tests.oracle import masked_attention, random_qkv

import nabla_attn as na

GRIDS = {
    "whole": na.TokenGrid(4, 8, 8, block=na.BlockShape(1, 4, 4)),
    "ragged": na.TokenGrid(3, 11, 13, block=na.BlockShape(1, 4, 4)),
    "one frame": na.TokenGrid(1, 9, 7, block=na.BlockShape(1, 3, 3)),
}


def band(grid, places, share, has_sink):
    """Who attends whom in an order, token by token."""
    block, total = grid.block.tokens, grid.num_tokens
    width = max(1, math.floor(total * (1 - math.sqrt(1 - share))) // block)
    at = places // block
    kept = (at[:, None] - at[None, :]).abs() < width
    return kept | (at * block < grid.height * grid.width) if has_sink else kept


def places_in(grid):
    """Position of every raster token frame by frame, and patch by patch."""
    raster = torch.arange(grid.num_tokens)
    patches = grid.height * grid.width
    return raster, raster % patches * grid.frames + raster // patches


def structured(grid, is_temporal):
    """Queries that find keys nearby, or those of the same place in other frames."""
    q, k, v = random_qkv(grid, batch=2, heads=3, dtype=torch.float64, sharpness=0)
    raster, patches = places_in(grid)
    at = (patches if is_temporal else raster).double() / grid.num_tokens
    waves = torch.cat([torch.cos(at[:, None] * n * 3.1) for n in range(1, 17)], dim=1)
    return q * 0.1 + 2 * waves, k * 0.1 + 2 * waves, v


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("sink", ["plain", "sink"])
def test_each_head_takes_the_band_that_loses_less(name, sink):
    grid = GRIDS[name]
    q, k, v = random_qkv(grid, batch=2, heads=6, dtype=torch.float64)
    out = na.nabla_attention(q, k, v, grid, f"svg-0.4-{sink}")
    rows = torch.linspace(0, grid.num_tokens - 1, min(32, grid.num_tokens)).long()
    exact = masked_attention(q, k, v, torch.ones(grid.num_tokens, grid.num_tokens).bool())
    outs = [
        masked_attention(q, k, v, band(grid, places, 0.4, sink == "sink"))
        for places in places_in(grid)
    ]
    losses = [(each - exact)[:, :, rows].square().mean(dim=(2, 3)) for each in outs]
    expected = torch.where((losses[1] < losses[0])[..., None, None], outs[1], outs[0])
    torch.testing.assert_close(out, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("is_temporal", [False, True])
def test_heads_that_look_along_time_are_found(is_temporal):
    grid = GRIDS["whole"]
    q, k, v = structured(grid, is_temporal)
    found = na.build_block_map(q, k, grid, "svg-0.4", v=v)
    expected = places_in(grid)[is_temporal].argsort()
    assert torch.equal(found.q_order.tokens, expected.expand_as(found.q_order.tokens))


def test_equal_losses_take_the_spatial_band():
    grid = GRIDS["one frame"]
    q, k, v = random_qkv(grid, dtype=torch.float64)
    found = na.build_block_map(q, k, grid, "svg-0.5", v=v)
    assert torch.equal(found.q_order.tokens[0, 0], torch.arange(63))


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 1])
def test_the_band_keeps_its_share(share):
    grid = na.TokenGrid(8, 16, 16, block=na.BlockShape(1, 4, 4))
    q, k, v = random_qkv(grid)
    found = na.build_block_map(q, k, grid, f"svg-{share}", v=v)
    assert found.density == pytest.approx(share, abs=0.02)


def test_a_full_band_is_dense():
    grid = GRIDS["ragged"]
    q, k, v = random_qkv(grid, dtype=torch.float64)
    dense = na.nabla_attention(q, k, v, grid, "dense")
    torch.testing.assert_close(na.nabla_attention(q, k, v, grid, "svg-1"), dense, atol=1e-9, rtol=0)
