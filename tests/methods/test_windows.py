"""Methods that know the grid alone: sliding tiles, neighbourhoods, frames. Definitions in loops."""

import pytest
import torch
from tests.oracle import ODD_GRIDS, masked_attention, random_qkv, token_mask

import nabla_attn as na
from nabla_attn.block_selection import select_blocks
from nabla_attn.core.order import TokenLayout
from nabla_attn.methods import Moment
from nabla_attn.methods.lvsa import choose_interval

GRIDS = {
    **ODD_GRIDS,
    "five tiles": na.TokenGrid(5, 20, 28, block=na.BlockShape(1, 4, 4)),
}


def block_mask(grid, algorithm, step=None):
    q = torch.zeros(1, 1, grid.num_slots, 8)
    moment = Moment(step=step, num_steps=None if step is None else 50)
    grid = grid.with_block(na.parse(algorithm).block)
    return select_blocks(q, q, TokenLayout(grid), na.parse(algorithm), moment=moment).mask[0, 0]


def table(size, sees):
    return torch.tensor([[sees(q, k) for k in range(size)] for q in range(size)]).long()


def sta_axis(q, k, size, side, reading):
    """Whether a tile sees another along an axis of `size` tiles."""
    if reading == "clipped":
        return abs(q - k) <= side // 2
    if reading == "exact":
        left, right = side // 2, side // 2 + (side % 2 - 1)
        centre = min(max(q, left), size - 1 - right)
        return centre - left <= k <= centre + right
    centre = min(max(q, side // 2), size - 1 - side // 2)
    return abs(centre - k) <= side // 2


def sta_by_definition(grid, window, reading):
    clips = []
    for blocks in grid.segment_blocks:
        kept = torch.ones(1, 1, dtype=torch.long)
        for size, side in zip((blocks, *grid.blocks[1:]), window, strict=True):
            rule = (size, side, reading)
            kept = torch.kron(kept, table(size, lambda q, k, rule=rule: sta_axis(q, k, *rule)))
        clips.append(kept)
    return torch.block_diag(*clips).bool()


@pytest.mark.parametrize("reading", ["clipped", "exact", "wide"])
@pytest.mark.parametrize("window", [(3, 3, 3), (2, 4, 2), (1, 1, 5), (9, 2, 9)])
@pytest.mark.parametrize("name", GRIDS)
def test_readings_of_sliding_tiles(name, window, reading):
    grid = GRIDS[name]
    text = "-".join(map(str, window))
    mask = block_mask(grid, f"sta-{text}-{reading}")
    assert torch.equal(mask, sta_by_definition(grid, window, reading))


@pytest.mark.parametrize(("reading", "kept"), [("exact", 2 * 4 * 4), ("wide", 3 * 5 * 5)])
def test_moved_windows_have_one_size_in_all_rows(reading, kept):
    mask = block_mask(GRIDS["five tiles"], f"sta-2-4-4-{reading}")
    assert mask.sum(dim=1).unique().tolist() == [kept]


def test_the_default_reading_is_that_of_nabla():
    assert str(na.parse("sta-11-3-3-clipped")) == "sta-11-3-3"
    assert na.SparseConfig(window=(11, 3, 3)) == na.parse("sta-11-3-3")


def gna_axis(q, k, size, window, stride, dilation, is_causal):
    """NATTEN's rule for one query and key along one axis of `size` places."""
    if q % dilation != k % dilation:
        return False
    length = len(range(q % dilation, size, dilation))
    q, k = q // dilation, k // dilation
    if is_causal:
        leader = min(q // stride * stride + stride - 1, length - 1)
        return q >= k and leader - k < window
    left, right = window // 2, window // 2 + (window % 2 - 1)
    leader = min(q // stride * stride + stride // 2, length - 1)
    centre = min(max(leader, left), length - 1 - right)
    return centre - left <= k <= centre + right


def gna_tokens(grid, window, stride, dilation, causal):
    is_causal = (causal != "none", causal == "all", causal == "all")
    clips = []
    for frames in grid.segment_frames:
        kept = torch.ones(1, 1, dtype=torch.long)
        sizes = (frames, grid.height, grid.width)
        for size, *rule in zip(sizes, window, stride, dilation, is_causal, strict=True):
            axis = table(size, lambda q, k, size=size, rule=rule: gna_axis(q, k, size, *rule))
            kept = torch.kron(kept, axis)
        clips.append(kept)
    return torch.block_diag(*clips).bool()


CASES = [
    ((3, 5, 5), (1, 1, 1), (1, 1, 1), "none"),
    ((2, 4, 6), (2, 3, 2), (1, 1, 1), "none"),
    ((2, 3, 4), (1, 2, 1), (2, 2, 3), "none"),
    ((2, 5, 5), (1, 4, 2), (1, 1, 2), "frames"),
    ((9, 99, 4), (2, 5, 4), (1, 2, 1), "all"),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["ragged", "clips", "cube-blocks", "below-a-block"])
def test_neighbourhoods_are_those_of_tokens_grown_to_blocks(name, case):
    grid = GRIDS[name]
    numbers = "-".join(str(side) for sides in case[:3] for side in sides)
    found = na.build_block_map(*random_qkv(grid)[:2], grid, f"gna-{numbers}-{case[3]}")
    tokens = gna_tokens(grid, *case)
    assert tokens.any(dim=1).all()
    # The smallest map of blocks that holds all pairs of tokens.
    expected = token_mask(found, grid)[0, 0]
    assert not (tokens & ~expected).any()
    layout = TokenLayout(grid)
    slots = torch.arange(1, grid.num_tokens + 1)[None, None, :, None]
    block = na.to_blocks(slots, layout).flatten().view(grid.num_blocks, -1)
    for row, column in found.mask[0, 0].nonzero().tolist():
        q, k = (block[index][block[index] > 0] - 1 for index in (row, column))
        assert tokens[q][:, k].any(), (row, column)


@pytest.mark.parametrize("name", ["exact", "five tiles"])
def test_blocks_as_strides_make_blocked_attention(name):
    grid = GRIDS[name]
    sides = (1, grid.block.height, grid.block.width)
    text = "-".join(map(str, sides))
    mask = block_mask(grid, f"gna-{text}-{text}")
    assert torch.equal(mask, torch.eye(grid.num_blocks).bool())


def test_strides_of_blocks_are_exact():
    grid = GRIDS["five tiles"]
    q, k, v = random_qkv(grid, dtype=torch.float64)
    out = na.nabla_attention(q, k, v, grid, "gna-3-12-12-1-4-4")
    tokens = gna_tokens(grid, (3, 12, 12), (1, 4, 4), (1, 1, 1), "none")
    torch.testing.assert_close(out, masked_attention(q, k, v, tokens))


def test_strides_beyond_the_window_are_refused():
    with pytest.raises(ValueError, match=r"stride must not exceed the window.*got stride"):
        na.parse("gna-3-3-3-1-4-1")


def lvsa_frames(frames, window, first, interval, offset):
    """Kept frames of every frame, from the definition."""
    anchors = set(range(min(first, frames)))
    anchors |= {(offset + i * interval) % frames for i in range(-(-frames // interval))}
    rows = []
    for at in range(frames):
        kept = set(anchors)
        if window:
            low = max(0, min(at - window, frames - 1 - 2 * window))
            high = min(frames - 1, max(at + window, 2 * window))
            target = min(2 * window + 1, frames - len(anchors))
            while len(set(range(low, high + 1)) - anchors) < target:
                low = max(0, low - 1)
                if len(set(range(low, high + 1)) - anchors) >= target:
                    break
                high = min(frames - 1, high + 1)
            kept |= set(range(low, high + 1))
        rows.append([key in kept for key in range(frames)])
    return torch.tensor(rows)


@pytest.mark.parametrize("step", [None, 0, 1, 7])
@pytest.mark.parametrize(("window", "first", "interval"), [(1, 1, 4), (0, 2, 3), (2, 0, 5)])
@pytest.mark.parametrize("frames", [(13,), (5, 9), (1,)])
def test_frames_of_lvsa(frames, window, first, interval, step):
    segments = frames if len(frames) > 1 else None
    grid = na.TokenGrid(sum(frames), 8, 11, segments=segments)
    mask = block_mask(grid, f"lvsa-5-{window}-{first}-{interval}", step)
    offset = (step or 0) % interval
    clips = [lvsa_frames(each, window, first, interval, offset) for each in frames]
    expected = torch.block_diag(*clips).bool()
    per_frame = 2
    assert torch.equal(
        mask, expected.repeat_interleave(per_frame, 0).repeat_interleave(per_frame, 1)
    )


def test_fixed_key_frames_and_blocks_of_frames():
    grid = na.TokenGrid(9, 4, 4, block=na.BlockShape(2, 4, 4))
    fixed = [block_mask(grid, "lvsa-3-1-1-4-fixed", step) for step in (0, 3)]
    assert torch.equal(*fixed)
    frames = lvsa_frames(9, 1, 1, 4, 0)
    padded = torch.nn.functional.pad(frames, (0, 1, 0, 1)).view(5, 2, 5, 2)
    assert torch.equal(fixed[0], padded.any(dim=3).any(dim=1))


def test_intervals_keep_the_number_of_frames_attended():
    assert choose_interval(21, 21, 3, 1) == 1
    for frames in (41, 61, 81, 121):
        interval = choose_interval(frames, 21, 3, 1)
        kept = lvsa_frames(frames, 3, 1, interval, 0).sum(dim=1)
        assert kept.min() == kept.max() and abs(int(kept[0]) - 21) <= 3, (frames, interval)
    # Just above the reference the strict count would be every frame.
    assert choose_interval(22, 21, 3, 1) == 2


@pytest.mark.parametrize(
    "algorithm", ["sta-2-2-2-exact", "gna-1-5-5-1-2-2-1-1-2-all", "lvsa-2-1-1-2"]
)
def test_they_hold_what_all_promise(algorithm):
    na.testing.check_method(algorithm)
