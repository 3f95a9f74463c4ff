"""Rules of selection against plain definitions: sort, cumulate, compare, row by row."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nabla_attn.core.select import (
    SCOPES,
    count_of_share,
    first_highest,
    select_above_mean,
    select_by_mass,
    select_by_normalised_share,
    select_by_quantile,
    select_top,
    select_top_share,
    select_within_mass,
)

INF = float("inf")
# Few different values, both signs and both zeros, so that ties are common.
SCORES = st.sampled_from([-3.5, -1.0, -0.5, -0.0, 0.0, 0.25, 0.5, 1.0, 2.0])


def descending(row):
    """Indices from the highest to the lowest, ties to the lower index."""
    return sorted(range(len(row)), key=lambda index: (-row[index], index))


@st.composite
def dyadic_rows(draw):
    """Probabilities that are whole multiples of 2^-10: every sum is exact, and ties are common."""
    size = draw(st.integers(1, 12))
    weights = draw(st.lists(st.integers(0, 6), min_size=size, max_size=size))
    weights[draw(st.integers(0, size - 1))] += 1024 - sum(weights)
    return [weight / 1024 for weight in weights]


@st.composite
def pairs_of_heads(draw, *, with_hidden=True):
    """Scores [heads, rows, columns] with ties; some are minus infinity, none of the diagonal."""
    heads, size = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    scores = torch.tensor(
        draw(st.lists(SCORES, min_size=heads * size**2, max_size=heads * size**2)),
        dtype=torch.float64,
    ).view(heads, size, size)
    if with_hidden and draw(st.booleans()):
        clip = torch.arange(size) < draw(st.integers(1, size))
        scores = scores.masked_fill(clip[:, None] != clip[None, :], -INF)
    return scores


@given(row=st.lists(SCORES, min_size=1, max_size=12), count=st.integers(1, 12))
@settings(max_examples=200)
def test_top_of_any_sign_is_the_head_of_the_sorted_row(row, count):
    kept = select_top(torch.tensor([row]), torch.tensor(float(count)))[0]
    assert kept.nonzero().flatten().tolist() == sorted(descending(row)[:count])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_finds_extremes_of_a_dtype(dtype):
    info = torch.finfo(dtype)
    row = torch.tensor([[info.min, -info.tiny, 0.0, info.tiny, info.max, -INF]], dtype=dtype)
    for count, expected in enumerate(([4], [3, 4], [2, 3, 4], [1, 2, 3, 4], [0, 1, 2, 3, 4]), 1):
        kept = select_top(row, torch.tensor(count, dtype=dtype))[0]
        assert kept.nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_that_never_reaches_its_target_is_kept_whole(dtype):
    row = torch.tensor([[0.25, 0.0, 0.25, 0.25]], dtype=dtype)
    assert select_by_mass(row, 0.9).all()
    assert select_within_mass(row, 0.9).all()
    assert select_top(-row, torch.tensor(9, dtype=dtype)).all()


def test_a_score_that_is_not_a_number_keeps_its_row():
    row = torch.tensor([[0.0, float("nan"), 1.0], [0.0, 2.0, 1.0]])
    for kept in (
        select_top(row, torch.tensor(1.0)),
        select_above_mean(row, 0.5),
        select_by_quantile(row, 0.9),
        select_by_normalised_share(row[None, None], 0.1, own=torch.eye(2, 3).bool())[0, 0],
    ):
        assert kept[0].all() and not kept[1].all()


@pytest.mark.parametrize(
    ("share", "count", "up", "down", "nearest"),
    [(0.1, 30, 3, 3, 3), (0.15, 10, 2, 1, 2), (0.05, 10, 1, 1, 1), (0.36, 10, 4, 3, 4)],
)
def test_shares_are_rounded_as_asked(share, count, up, down, nearest):
    for rounding, expected in (("up", up), ("down", down), ("nearest", nearest)):
        assert count_of_share(share, count, rounding) == expected
        kept = select_top_share(torch.zeros(2, count), share, rounding=rounding)
        assert kept.sum(-1).tolist() == [expected] * 2 and kept[:, :expected].all()


def test_unknown_names_and_shares_out_of_range_are_refused():
    own = torch.eye(2).bool()
    with pytest.raises(ValueError, match="unknown rounding 'off'"):
        count_of_share(0.5, 3, "off")
    with pytest.raises(ValueError, match="unknown scope 'layer'"):
        select_by_normalised_share(torch.zeros(1, 1, 2, 2), 0.5, own=own, scope="layer")
    with pytest.raises(ValueError, match=r"\[0, 1\): got 1"):
        select_by_quantile(torch.zeros(1, 2, 2), 1)
    with pytest.raises(ValueError, match=r"\(0, 1\]: got 0"):
        select_within_mass(torch.ones(1, 1), 0)


@given(row=dyadic_rows(), threshold=st.integers(1, 1024))
@settings(max_examples=300)
def test_within_mass_leaves_the_crossing_block_out(row, threshold):
    order, held, count = descending(row), 0.0, 0
    for index in order:
        held += row[index]
        if held > threshold / 1024:
            break
        count += 1
    kept = select_within_mass(torch.tensor([row]), threshold / 1024)[0]
    expected = range(len(row)) if threshold == 1024 else order[: max(1, count)]
    assert kept.nonzero().flatten().tolist() == sorted(expected)


@given(row=dyadic_rows(), threshold=st.integers(1, 1024))
def test_the_crossing_block_is_all_that_the_two_rules_of_mass_differ_in(row, threshold):
    probs = torch.tensor([row])
    out, inside = (
        select_within_mass(probs, threshold / 1024),
        select_by_mass(probs, threshold / 1024),
    )
    assert (out <= inside).all() and (inside.sum() - out.sum()) in (0, 1)


@given(scores=pairs_of_heads(), factor=st.sampled_from([-2.0, -0.5, 0.0, 0.7, 1.3, 9.0]))
@settings(max_examples=200)
def test_above_mean(scores, factor):
    kept = select_above_mean(scores, factor)
    for row, mine in zip(scores.flatten(0, 1).tolist(), kept.flatten(0, 1).tolist(), strict=True):
        seen = [score for score in row if score > -INF]
        mean = math.fsum(seen) / len(seen)
        deviation = math.sqrt(math.fsum((score - mean) ** 2 for score in seen) / len(seen))
        limit = mean + factor * deviation
        if any(abs(score - limit) < 1e-12 for score in seen):
            continue
        expected = [index for index, score in enumerate(row) if score > limit]
        expected = sorted({*expected, descending(row)[0]})
        assert [index for index, is_kept in enumerate(mine) if is_kept] == expected


def test_above_mean_takes_a_deviation_from_outside():
    scores = torch.tensor([[0.0, 1.0, 2.0, 5.0]])
    assert select_above_mean(scores, 1.0, deviation=torch.tensor([[0.5]])).sum() == 1
    assert select_above_mean(scores, 1.0, deviation=torch.tensor([[-0.5]])).sum() == 2
    assert select_above_mean(scores, -1e9).all()
    assert select_above_mean(torch.ones(1, 4), 0.0).tolist() == [[True, False, False, False]]


@given(scores=pairs_of_heads(), dropped=st.floats(0, 0.999))
@settings(max_examples=200)
def test_quantile_over_a_head(scores, dropped):
    kept = select_by_quantile(scores, dropped)
    for head, mine in zip(scores, kept, strict=True):
        seen = sorted(score for score in head.flatten().tolist() if score > -INF)
        limit = seen[int(dropped * len(seen))]
        for row, is_kept in zip(head.tolist(), mine.tolist(), strict=True):
            expected = {index for index, score in enumerate(row) if score >= limit}
            expected.add(descending(row)[0])
            assert {index for index, kept in enumerate(is_kept) if kept} == expected


def test_quantile_keeps_at_least_its_share_and_more_where_scores_are_equal():
    scores = torch.randn(2, 20, 20)
    for dropped in (0.0, 0.5, 0.9):
        kept = select_by_quantile(scores, dropped).flatten(1).sum(-1)
        assert (kept >= 400 - int(dropped * 400)).all()
    assert select_by_quantile(torch.ones(1, 4, 4), 0.75).all()


def vmoba(pairs, own, threshold):
    """VMoBA's rule on one scope, lists of scores and of own pairs, by sorting."""
    seen = [index for index, score in enumerate(pairs) if score > -INF]
    low, high = min(pairs[i] for i in seen), max(pairs[i] for i in seen)
    span = high - low if high - low > 1e-6 else 1.0
    share = {index: (pairs[index] - low) / span for index in seen}
    total = math.fsum(share.values())
    if total == 0:
        return set(seen)
    wanted = max(0.0, threshold * total - math.fsum(share[i] for i in seen if own[i]))
    kept, held = {i for i in seen if own[i]}, 0.0
    others = sorted((i for i in seen if not own[i]), key=lambda i: (-share[i], i))
    for number, index in enumerate(others):
        if number and held >= wanted:
            break
        kept.add(index)
        held += share[index]
    return kept


@pytest.mark.parametrize("scope", SCOPES)
@given(seed=st.integers(0, 999), threshold=st.integers(1, 98), is_flat=st.booleans())
@settings(max_examples=60)
def test_normalised_share(scope, seed, threshold, is_flat):
    # Whole numbers in [0, 8], so that shares are exact; odd thresholds meet none of their sums.
    threshold = threshold / 100 + 0.00123456789
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 9, (2, 3, 4, 4), generator=generator).double()
    scores[:, :, 0, 0], scores[:, :, 3, 3] = 0.0, 8.0
    if is_flat:
        scores = torch.zeros_like(scores)
    scores[:, :, :2, 3], scores[:, :, 3, :2] = -INF, -INF
    own = torch.eye(4).bool()
    kept = select_by_normalised_share(scores, threshold, own=own, scope=scope)
    index = torch.arange(scores.numel()).view_as(scores)
    rows = {
        "row": index.flatten(0, 2),
        "column": index.permute(0, 3, 1, 2).flatten(2).flatten(0, 1),
        "head": index.flatten(2).flatten(0, 1),
        "all": index.flatten(1),
    }[scope]
    flat, always = scores.flatten(), own.expand(scores.shape).flatten()
    for row in rows:
        expected = vmoba(flat[row].tolist(), always[row].tolist(), threshold)
        assert set(kept.flatten()[row].nonzero().flatten().tolist()) == expected


def test_normalised_share_of_one_keeps_all_but_the_lowest():
    scores = torch.tensor([[[[4.0, 0.0, 1.0, 3.0]]]])
    kept = select_by_normalised_share(scores, 1, own=torch.tensor([[True, False, False, False]]))
    assert kept.flatten().tolist() == [True, False, True, True]


def test_one_other_block_is_kept_when_own_blocks_reach_the_share():
    scores = torch.tensor([[[[1.0, 0.0, 0.0]]]])
    kept = select_by_normalised_share(scores, 0.2, own=torch.tensor([[True, False, False]]))
    assert kept.flatten().tolist() == [True, True, False]
    own = torch.tensor([[True, False, True]])
    kept = select_by_normalised_share(torch.tensor([[[[1.0, 0.0, 0.0]]]]), 1, own=own)
    assert kept.flatten().tolist() == [True, True, True]


def test_first_highest_of_equal_blocks():
    assert first_highest(torch.tensor([[1.0, 2.0, 2.0], [-INF, -INF, -3.0]])).tolist() == [
        [False, True, False],
        [False, False, True],
    ]
