import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.oracle import ODD_GRIDS

import nabla_attn as na
from nabla_attn.core.order import TokenLayout, block_order

sizes = st.integers(1, 19)


@st.composite
def grids(draw):
    frames = draw(st.integers(1, 6))
    segments = None
    if draw(st.booleans()):
        cut = draw(st.integers(0, frames - 1))
        segments = (frames,) if cut == 0 else (cut, frames - cut)
    shapes = [(1, 8, 8), (1, 16, 8), (2, 8, 8), (4, 4, 4), (1, 3, 5)]
    block = na.BlockShape(*draw(st.sampled_from(shapes)))
    return na.TokenGrid(frames, draw(sizes), draw(sizes), segments=segments, block=block)


@given(grid=grids(), before=st.integers(0, 70), after=st.integers(0, 70))
def test_round_trip_restores_every_token_and_pads_with_zeros(grid, before, after):
    layout = TokenLayout(grid, before, after)
    x = torch.arange(1.0, layout.num_tokens + 1)[None, :, None].expand(2, -1, 3)
    blocks = na.to_blocks(x, layout, dim=1)
    assert blocks.shape[1] == layout.num_slots
    assert (blocks == 0).sum() == 2 * 3 * (layout.num_slots - layout.num_tokens)
    assert torch.equal(na.to_raster(blocks, layout, dim=1), x)
    counts = block_order(layout, x.device).counts
    is_token = blocks[0, :, 0].view(-1, grid.block.tokens) > 0
    assert torch.equal(is_token.sum(1), counts)
    assert (counts > 0).all()
    # Tokens first, empty slots last.
    assert torch.equal(is_token, torch.arange(grid.block.tokens) < counts[:, None])


@pytest.mark.parametrize("name", [f"t{t}" for t in ("1h8w8", "2h16w24", "3h24w16", "4h32w40")])
def test_order_equals_the_reference(name, golden):
    z = golden("reorder.npz")
    frames, rest = name[1:].split("h")
    height, width = rest.split("w")
    grid = na.TokenGrid(int(frames), int(height), int(width))
    order = block_order(TokenLayout(grid), torch.device("cpu"))
    assert np.array_equal(order.to_blocks.numpy(), z[f"to_block_{name}_p8"])
    assert np.array_equal(order.to_raster.numpy(), z[f"to_raster_{name}_p8"])


def test_order_with_blocks_of_side_four_equals_the_reference(golden):
    z = golden("reorder.npz")
    grid = na.TokenGrid(2, 8, 12, block=na.BlockShape(1, 4, 4))
    order = block_order(TokenLayout(grid), torch.device("cpu"))
    assert np.array_equal(order.to_blocks.numpy(), z["to_block_t2h8w12_p4"])


def test_blocks_hold_the_tokens_of_their_patch():
    grid = na.TokenGrid(2, 11, 13)
    rows = torch.arange(11)[None, :, None].expand(2, 11, 13).flatten()
    block = na.to_blocks(rows, grid, dim=0).view(grid.num_blocks, -1)[3]
    # The last block of the first frame has rows 8 to 10 and columns 8 to 12: 15 tokens.
    assert block[:15].tolist() == [8] * 5 + [9] * 5 + [10] * 5


def test_padding_share_of_a_720p_frame():
    assert na.TokenGrid(21, 45, 80).padding_share <= 0.067
    assert na.TokenGrid(21, 48, 80).padding_share == 0


def test_no_block_spans_two_clips():
    grid = na.TokenGrid(5, 8, 8, segments=(3, 2), block=na.BlockShape(2, 8, 8))
    assert grid.blocks == (3, 1, 1)
    assert block_order(TokenLayout(grid), torch.device("cpu")).counts.tolist() == [128, 64, 128]


@pytest.mark.parametrize("bad", [(0, 8, 8), (1, -2, 8), (1, 8, 2.0), (True, 8, 8)])
def test_sizes_must_be_positive_integers(bad):
    with pytest.raises(ValueError, match="positive integer"):
        na.TokenGrid(*bad)


def test_grids_say_what_they_are():
    grid = na.TokenGrid(3, 11, 13)
    assert grid.is_ragged and not na.TokenGrid(3, 16, 8).is_ragged
    assert (str(grid), str(grid.block)) == ("3x11x13", "1x8x8")
    with pytest.raises(ValueError, match="must not be negative: got 2 before and -1 after"):
        TokenLayout(grid, 2, -1)


def test_segments_must_sum_to_the_frames():
    with pytest.raises(ValueError, match=r"sum to the frames: got \(2, 2\) = 4 for 5"):
        na.TokenGrid(5, 8, 8, segments=(2, 2))


def test_wrong_token_count_names_grid_and_remedy():
    with pytest.raises(ValueError, match=r"got 3600 tokens for 5x24x32 = 3840\. Pass the grid"):
        na.to_blocks(torch.zeros(1, 1, 3600, 4), na.TokenGrid(5, 24, 32))


def test_tables_made_in_inference_mode_serve_a_later_backward():
    grid = na.TokenGrid(1, 5, 7)
    with torch.inference_mode():
        na.to_blocks(torch.zeros(1, 1, 35, 2), grid)
    x = torch.zeros(1, 1, 35, 2, requires_grad=True)
    na.to_blocks(x, grid).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_rotary_tables_move_with_their_tokens():
    grid = ODD_GRIDS["ragged"]
    table = torch.randn(grid.num_tokens, 1, 6)
    assert torch.equal(na.to_raster(na.to_blocks(table, grid, dim=0), grid, dim=0), table)


@pytest.mark.parametrize(
    ("grid", "algorithm"),
    [
        ((2, 16, 16), "nabla-0.5_block-1000-1000-1000"),
        ((2, 16, 16), "nabla-0.5_block-1-64-65"),
        ((1, 1, 4096), "sta-1-1-1_block-64-64-1"),
    ],
)
def test_blocks_far_beyond_the_grid_are_refused_before_any_work(grid, algorithm):
    q = torch.zeros(1, 1, 1, 1).expand(1, 1, grid[0] * grid[1] * grid[2], 8)
    with pytest.raises(ValueError, match=r"at most 4,096 tokens: got|are larger than the grid"):
        na.nabla_attention(q, q, q, na.TokenGrid(*grid), algorithm)


def test_a_single_token_may_have_the_paper_s_block():
    q = torch.randn(1, 2, 1, 8)
    torch.testing.assert_close(na.nabla_attention(q, q, q, na.TokenGrid(1, 1, 1), "nabla-0.5"), q)
