import pytest
import torch
from tests.oracle import masked_attention, random_qkv

import nabla_attn as na
from nabla_attn.block_selection import select_blocks
from nabla_attn.core.order import TokenLayout, to_blocks
from nabla_attn.methods import Moment

GRIDS = {
    "whole": na.TokenGrid(2, 8, 12, block=na.BlockShape(1, 4, 4)),
    "ragged": na.TokenGrid(3, 11, 13, block=na.BlockShape(1, 4, 4)),
    "one frame": na.TokenGrid(1, 9, 7, block=na.BlockShape(1, 3, 3)),
    "clips": na.TokenGrid(5, 6, 7, segments=(3, 2), block=na.BlockShape(1, 4, 4)),
}


def pairs(grid, window, is_local):
    """Who attends whom, from the definition, token by token."""
    starts, clips = [], []
    for clip, frames in enumerate(grid.segment_frames):
        starts += list(range(frames))
        clips += [(clip, frames)] * frames
    keys = []
    for frame in range(grid.frames):
        clip, frames = clips[frame]
        for h in range(grid.height):
            for w in range(grid.width):
                key = [clip]
                sizes = (frames, grid.height, grid.width)
                for at, size, side in zip((starts[frame], h, w), sizes, window, strict=True):
                    key.append(at // side if is_local else at % -(-size // side))
                keys.append(tuple(key))
    return torch.tensor([[x == y for y in keys] for x in keys])


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("window", [(1, 4, 4), (2, 3, 5), (9, 1, 99)])
def test_tokens_attend_those_of_the_same_remainders(name, window):
    grid = GRIDS[name]
    q, k, v = random_qkv(grid, batch=2, dtype=torch.float64)
    out = na.nabla_attention(q, k, v, grid, f"iwin-{'-'.join(map(str, window))}")
    mask = pairs(grid, window, is_local=False)
    torch.testing.assert_close(out, masked_attention(q, k, v, mask), atol=1e-9, rtol=0)
    found = na.build_block_map(q, k, grid, f"iwin-{'-'.join(map(str, window))}")
    assert found.density == pytest.approx(mask.double().mean().item())


def test_odd_layers_have_local_windows():
    grid = GRIDS["ragged"]
    q, k, _ = random_qkv(grid, dtype=torch.float64)

    def density(layer, algorithm):
        blocks = (to_blocks(x, TokenLayout(grid)) for x in (q, k))
        moment = Moment(layer=layer, num_layers=4)
        return select_blocks(*blocks, TokenLayout(grid), na.parse(algorithm), moment=moment)

    local, all_ = density(1, "iwin-1-4-4"), density(1, "iwin-1-4-4-all")
    expected = pairs(grid, (1, 4, 4), is_local=True).double().mean().item()
    assert local.density == pytest.approx(expected)
    assert torch.equal(all_.q_order.tokens, density(0, "iwin-1-4-4").q_order.tokens)
    assert torch.equal(density(2, "iwin-1-4-4").q_order.tokens, all_.q_order.tokens)


def test_a_window_as_large_as_the_video_is_dense():
    grid = GRIDS["ragged"]
    q, k, v = random_qkv(grid, dtype=torch.float64)
    dense = na.nabla_attention(q, k, v, grid, "dense")
    out = na.nabla_attention(q, k, v, grid, "iwin-3-11-13")
    torch.testing.assert_close(out, dense, atol=1e-9, rtol=0)


def test_windows_of_a_block_make_a_diagonal_map():
    grid = na.TokenGrid(3, 16, 24)
    q, k, _ = random_qkv(grid)
    mask = na.build_block_map(q, k, grid, "iwin-1-8-8").mask
    assert torch.equal(mask[0, 0], torch.eye(18).bool())


def test_one_interleaved_and_one_local_window_reach_everything():
    grid = na.TokenGrid(1, 16, 16)
    far, near = (pairs(grid, (1, 4, 4), is_local).double() for is_local in (False, True))
    assert ((near @ far) > 0).all()
