import pytest
import torch
from tests.oracle import ODD_GRIDS

import nabla_attn as na
from nabla_attn.core.order import TokenLayout
from nabla_attn.core.token_orders import parse_order

GRIDS = {
    "long": na.TokenGrid(12, 6, 8, block=na.BlockShape(1, 2, 4)),
    "ragged": na.TokenGrid(7, 7, 11, block=na.BlockShape(1, 4, 4)),
    "two frames a block": na.TokenGrid(5, 8, 8, block=na.BlockShape(2, 4, 4)),
    "clips": na.TokenGrid(7, 8, 8, segments=(5, 2), block=na.BlockShape(1, 2, 4)),
    "one frame": ODD_GRIDS["one-frame"],
}


def pair_mask(i, j, first, tokens, decay, block, has_sink):
    """Kept pairs of places of frames i and j, dense."""
    place = torch.arange(tokens)
    apart = (place[:, None] - place).abs()
    if has_sink and j == first:
        return torch.ones(tokens, tokens, dtype=torch.bool)
    distance = abs(i - j)
    length = 2 ** tokens.bit_length() / 2 ** distance.bit_length()
    width = tokens if distance <= 1 else max(length * decay, block)
    is_split = length < block and distance % int(block / length) != 0
    return apart <= (-1 if is_split and distance > 1 else width)


def definition(grid, decay, has_sink):
    """Token pairs of frames, cut in blocks, each frame pair by itself; columns by their filling."""
    layout, block = TokenLayout(grid), grid.block.tokens
    slots = na.to_blocks(torch.arange(1, grid.num_tokens + 1)[None, None, :, None], layout)
    slots = slots.flatten().view(grid.num_blocks, -1)
    tokens = grid.height * grid.width
    # Whether a block holds a token, by frames.
    holds = torch.zeros(grid.num_blocks, grid.num_tokens + 1, dtype=torch.float64)
    holds = holds.scatter(1, slots, 1)[:, 1:].unflatten(1, (grid.frames, tokens))
    sizes = holds.sum(dim=(1, 2))[:, None]
    clips, start = [], 0
    for frames in grid.segment_frames:
        clips += [start] * frames
        start += frames
    kept = torch.zeros(grid.num_blocks, grid.num_blocks, dtype=torch.bool)
    for i in range(grid.frames):
        for j in range(grid.frames):
            if clips[i] != clips[j]:
                continue
            mask = pair_mask(i, j, clips[i], tokens, decay, block, has_sink)
            density = holds[:, i] @ mask.double() / sizes
            well, some = ((density > least).double() @ holds[:, j].T for least in (1 / 3, 0))
            kept |= well / (some + 1e-9) > 0.6
    return kept


def found(grid, algorithm):
    q = torch.zeros(1, 1, grid.num_tokens, 8)
    return na.build_block_map(q, q, grid, algorithm)


@pytest.mark.parametrize("sink", ["first", "none"])
@pytest.mark.parametrize("name", GRIDS)
def test_bands_of_frame_pairs(name, sink):
    grid = GRIDS[name]
    mask = found(grid, f"radial-0.3-{sink}").mask[0, 0]
    assert torch.equal(mask, definition(grid, 0.3, sink == "first"))
    assert mask.diagonal().all()


def test_some_pairs_are_dropped_and_some_cut():
    mask = found(GRIDS["long"], "radial-0.3-none").mask[0, 0].view(12, 6, 12, 6)
    pairs = mask.float().mean(dim=(1, 3))
    assert {0.0, 1.0} < set(pairs.unique().tolist())


def test_density_of_its_authors_at_21_frames_of_3200_tokens():
    # As published: blocks of 128 tokens in raster order.
    block_map = found(na.TokenGrid(21, 40, 80), "radial-0.2_block-1-8-16_order-raster")
    assert block_map.density == pytest.approx(0.277, abs=5e-4)


def test_blocks_of_raster_order_may_hold_two_frames():
    grid = na.TokenGrid(7, 5, 9, block=na.BlockShape(1, 2, 8), order=parse_order("raster"))
    mask = found(grid, "radial-0.3").mask[0, 0]
    assert torch.equal(mask, definition(grid, 0.3, has_sink=True))


def test_blocks_of_many_frames_are_refused():
    grid = na.TokenGrid(5, 8, 8, block=na.BlockShape(4, 4, 4))
    with pytest.raises(ValueError, match=r"at most 2 frames: got 4 in blocks of 4x4x4. Use blocks"):
        found(grid, "radial-0.2")
