import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.oracle import ODD_GRIDS

import nabla_attn as na
from nabla_attn.core import select
from nabla_attn.core.order import TokenLayout, block_order, to_blocks
from nabla_attn.core.scores import pool_blocks, pool_raster, score_blocks, split_raster
from nabla_attn.core.select import select_by_mass, select_top_share
from nabla_attn.core.window import build_first_frame_map, build_segment_map, build_window_map
from nabla_attn.reference_map import keep_by_mass

CPU = torch.device("cpu")


@st.composite
def dyadic_rows(draw):
    """Probabilities that are whole multiples of 2^-10: every sum is exact, and ties are common."""
    size = draw(st.integers(1, 12))
    weights = draw(st.lists(st.integers(0, 6), min_size=size, max_size=size))
    rest = 1024 - sum(weights)
    weights[draw(st.integers(0, size - 1))] += rest
    return [weight / 1024 for weight in weights]


@given(row=dyadic_rows(), threshold=st.integers(1, 1024))
@settings(max_examples=300)
def test_kept_mass_follows_the_law_ties_included(row, threshold):
    rows = torch.tensor([row])
    kept = select_by_mass(rows, threshold / 1024)
    assert torch.equal(kept, keep_by_mass(rows, threshold / 1024))


@given(seed=st.integers(0, 999), low=st.floats(0.01, 1), high=st.floats(0.01, 1))
def test_a_higher_threshold_keeps_a_superset(seed, low, high):
    low, high = min(low, high), max(low, high)
    generator = torch.Generator().manual_seed(seed)
    probs = (3 * torch.randn(2, 5, 17, generator=generator)).softmax(-1)
    fewer, more = select_by_mass(probs, low), select_by_mass(probs, high)
    assert (fewer <= more).all()
    assert fewer.any(-1).all()
    mass = (probs * fewer).sum(-1)
    assert (mass >= low - 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [1, 2, 7, 32])
def test_short_rows_keep_what_long_ones_would(columns, dtype, monkeypatch):
    scores = 3 * torch.randn(2, 17, columns, dtype=dtype)
    scores[1, :9] = scores[1, :9].round()
    scores[1, 0, 0], scores[1, 1, 0] = float("nan"), -0.0
    scores[0, :5, 1:] = float("-inf")
    probs = scores.softmax(dim=-1)

    def kept():
        masses, shares = (1e-6, 0.3, 0.7, 1.0), (0.1, 0.5, 1.0)
        yield from (select_by_mass(probs, mass) for mass in masses)
        yield from (select.select_within_mass(probs, mass) for mass in masses)
        yield from (select_top_share(scores, share) for share in shares)

    short = list(kept())
    monkeypatch.setattr(select, "FEW", 0)
    assert all(map(torch.equal, short, kept()))


@pytest.mark.parametrize("few", [0, 32])
def test_a_row_that_falls_short_crosses_at_minus_infinity(few, monkeypatch):
    monkeypatch.setattr(select, "FEW", few)
    probs = torch.tensor([[0.25, 0.5], [0.25, 0.75]])
    crossing = select._crossing_value(probs, select._mass_of(probs), torch.tensor(0.8))
    assert crossing.tolist() == [[float("-inf")], [0.25]]


def test_threshold_one_keeps_all_and_a_tiny_one_keeps_the_peak():
    probs = torch.tensor([[0.0, 1.0, 0.0], [0.2, 0.3, 0.5]])
    assert select_by_mass(probs, 1).all()
    assert select_by_mass(probs, 1e-6).tolist() == [[False, True, False], [False, False, True]]


@pytest.mark.parametrize("bad", [0, -0.1, 1.01, float("nan")])
def test_thresholds_outside_zero_to_one_are_refused(bad):
    with pytest.raises(ValueError, match=r"in \(0, 1\]: got"):
        select_by_mass(torch.ones(1, 1), bad)


@pytest.mark.parametrize(("share", "kept"), [(0.1, 3), (0.2, 6), (0.01, 1), (0.11, 4), (1.0, 30)])
def test_top_share_keeps_that_many_and_prefers_the_lower_index(share, kept):
    flat = select_top_share(torch.ones(2, 30), share)
    assert flat.sum(-1).tolist() == [kept, kept]
    assert flat[:, :kept].all()


def test_pooling_leaves_empty_slots_out():
    grid = na.TokenGrid(1, 9, 8)
    x = torch.full((1, 1, 72, 4), 3.0, dtype=torch.bfloat16)
    counts = block_order(TokenLayout(grid), CPU).counts
    pooled = pool_blocks(to_blocks(x, grid), counts)
    assert pooled.dtype == torch.float32
    assert torch.equal(pooled, torch.full((1, 1, 2, 4), 3.0))


def test_scores_stay_fp32_under_autocast():
    q = torch.randn(1, 1, 5, 8)
    plain = score_blocks(q, q)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(score_blocks(q, q), plain)


def test_golden_windows(golden):
    z = golden("sta_masks.npz")
    for name in z.files:
        grid_name, window = name.removeprefix("sta_t").rsplit("_", 1)
        frames, rest = grid_name.split("h")
        rows, columns = rest.split("w")
        grid = na.TokenGrid(int(frames), 8 * int(rows), 8 * int(columns))
        sides = tuple(int(side) for side in window.split("-"))
        assert np.array_equal(build_window_map(grid, sides, CPU).numpy(), z[name]), name


def test_window_of_a_ragged_grid_counts_its_blocks():
    near = build_window_map(na.TokenGrid(3, 11, 13), (1, 3, 1), CPU)
    assert near.shape == (12, 12)
    assert near[0].nonzero().flatten().tolist() == [0, 2]


def test_the_paper_grid_has_the_paper_sparsity():
    grid = na.TokenGrid(21, 48, 80)
    shares = [
        build_window_map(grid, window, CPU).float().mean() for window in ((18, 5, 5), (18, 3, 3))
    ]
    assert [round(100 * (1 - share.item()), 2) for share in shares] == [79.45, 91.28]


def test_clips_do_not_see_each_other():
    grid = ODD_GRIDS["clips"]
    same = build_segment_map(grid, CPU)
    assert same[:6, :6].all() and same[6:, 6:].all()
    assert not same[:6, 6:].any() and not same[6:, :6].any()
    assert not (build_window_map(grid, (9, 9, 9), CPU) & ~same).any()


def test_first_frame_of_every_clip():
    grid = na.TokenGrid(5, 8, 16, segments=(2, 3))
    assert build_first_frame_map(grid, CPU).nonzero().flatten().tolist() == [0, 1, 4, 5]


@given(seed=st.integers(0, 9999), size=st.integers(1, 40), spread=st.floats(0, 30))
@settings(max_examples=200)
def test_bisection_equals_sorting(seed, size, spread):
    generator = torch.Generator().manual_seed(seed)
    rows = (spread * torch.randn(5, size, generator=generator, dtype=torch.float64)).softmax(-1)
    ordered = rows.sort(dim=-1, descending=True).values
    for threshold in (0.1, 0.5, 0.9, 0.999):
        clear = (ordered.cumsum(-1) - threshold).abs().min(-1).values > 1e-12
        kept = select_by_mass(rows, threshold)
        assert torch.equal(kept[clear], keep_by_mass(rows, threshold)[clear])


def test_rows_that_are_not_numbers_are_kept_whole():
    probs = torch.tensor([[float("nan")] * 3, [0.2, 0.3, 0.5]])
    assert select_by_mass(probs, 0.5).tolist() == [[True] * 3, [False, False, True]]


@pytest.mark.parametrize("block", [na.BlockShape(), na.BlockShape(2, 4, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_pooling_in_raster_order_is_pooling_of_blocks(block, dtype):
    grid = na.TokenGrid(4, 16, 24, block=block)
    x = torch.randn(2, 3, grid.num_tokens, 8).to(dtype)
    counts = torch.full((grid.num_blocks,), block.tokens)
    pooled = pool_raster(split_raster(x, grid))
    torch.testing.assert_close(pooled, pool_blocks(na.to_blocks(x, grid), counts))
