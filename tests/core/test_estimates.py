"""Estimates of blocks against their formulas, written out in float64 over lists of tokens."""

import pytest
import torch
from tests.oracle import BLOCK_GRIDS as GRIDS
from tests.oracle import Blocks
from torch.utils._python_dispatch import TorchDispatchMode

import nabla_attn as na
from nabla_attn.core import estimates, exact
from nabla_attn.core.cells import score_antidiagonals, score_cell_mass, score_cells
from nabla_attn.core.estimates import (
    first_order_norms,
    score_centroid_error,
    score_first_order,
    score_novelty,
    self_similarity,
)
from nabla_attn.core.exact import exact_mass, exact_residual, sum_blocks
from nabla_attn.core.scores import multiply_blocks, pool_blocks


@pytest.fixture(params=list(GRIDS))
def grid(request):
    return GRIDS[request.param]


@pytest.fixture(autouse=True)
def _small_panels(monkeypatch):
    """Several panels of heads and of rows even for small inputs."""
    for room in (estimates, exact):
        monkeypatch.setattr(room, "PANEL_VALUES", 2000)


def test_products_of_means(grid):
    x = Blocks(grid)
    expected = x.pairs(lambda q, k: q.mean(0) @ k.mean(0) * x.scale, x.q, x.k)
    torch.testing.assert_close(
        multiply_blocks(pool_blocks(x.q, x.counts), pool_blocks(x.k, x.counts)), expected
    )


def test_products_of_means_with_the_norm_of_the_first_order(grid):
    x = Blocks(grid)

    def formula(q, k, v):
        slope = sum(torch.outer(key - k.mean(0), value) for key, value in zip(k, v, strict=True))
        return q.mean(0) @ k.mean(0) * x.scale + (slope.square().sum().sqrt() + 1e-5).log()

    expected = x.pairs(formula, x.q, x.k, x.v)
    torch.testing.assert_close(score_first_order(x.q, x.k, x.v, x.counts), expected)


def test_equal_keys_have_no_first_order():
    x = Blocks(GRIDS["ragged"])
    k = torch.where(x.k == 0, 0, torch.ones_like(x.k))
    assert first_order_norms(k, x.v, x.counts).abs().max() < 1e-12


def test_error_of_the_centroid(grid):
    x = Blocks(grid)

    def formula(q, k, v):
        mine = (k @ q.mean(0) * x.scale).exp()[:, None] * v
        centroid = (k.mean(0) @ q.mean(0) * x.scale).exp() * v.mean(0)
        return (mine - centroid).square().sum().log()

    expected = x.pairs(formula, x.q, x.k, x.v)
    torch.testing.assert_close(score_centroid_error(x.q, x.k, x.v, x.counts), expected)


def test_the_centroid_of_a_single_token_makes_no_error():
    grid = na.TokenGrid(1, 3, 3, block=na.BlockShape(1, 1, 1))
    x = Blocks(grid)
    assert (score_centroid_error(x.q, x.k, x.v, x.counts) == -float("inf")).all()


@pytest.mark.parametrize("sharpness", [1e-4, 30.0])
def test_error_of_the_centroid_keeps_its_digits_in_fp32(sharpness):
    """Keys that hardly differ, whose terms cancel, and scores whose exponentials do not fit."""
    x = Blocks(GRIDS["ragged"])
    k = x.k * sharpness
    v = torch.where(x.v == 0, 0, 1 + 1e-3 * x.v)
    exact = score_centroid_error(x.q, k, v, x.counts)
    single = score_centroid_error(x.q.float(), k.float(), v.float(), x.counts)
    assert exact.isfinite().double().mean() > 0.5
    torch.testing.assert_close(single.double(), exact, rtol=1e-3, atol=2e-2)


@pytest.mark.parametrize("cell", [1, 4, 16])
def test_log_sum_exp_over_cells(grid, cell):
    x = Blocks(grid)

    def formula(q, k):
        means = [torch.stack([part.mean(0) for part in tokens.split(cell)]) for tokens in (q, k)]
        return (means[0] @ means[1].T * x.scale).exp().sum().log()

    expected = x.pairs(formula, x.q, x.k)
    torch.testing.assert_close(score_cells(x.q, x.k, x.counts, cell_tokens=cell), expected)


def test_cells_of_whole_blocks_are_products_of_means(grid):
    x = Blocks(grid)
    scores = score_cells(x.q, x.k, x.counts, cell_tokens=x.size)
    pooled = multiply_blocks(pool_blocks(x.q, x.counts), pool_blocks(x.k, x.counts))
    torch.testing.assert_close(scores, pooled)


@pytest.mark.parametrize("cell", [1, 4, 16])
def test_probabilities_between_cells(grid, cell):
    x = Blocks(grid)

    def row(i, queries, keys):
        shares = torch.zeros(len(keys), dtype=torch.float64)
        cells_of = [[part.mean(0) for part in tokens.split(cell)] for tokens in keys]
        for query in [part.mean(0) for part in queries[i].split(cell)]:
            weights = [
                sum(float((query @ key * x.scale).exp()) for key in cells) * x.sees(i, j)
                for j, cells in enumerate(cells_of)
            ]
            shares += torch.tensor(weights, dtype=torch.float64) / sum(weights)
        return shares / len(queries[i].split(cell))

    expected = x.by_rows(row, x.q, x.k)
    scores = score_cell_mass(x.q, x.k, x.counts, cell_tokens=cell, allowed=x.allowed)
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(scores.sum(-1), torch.ones_like(scores[..., 0]))


@pytest.mark.parametrize("stride", [1, 4, 8])
def test_antidiagonals(grid, stride):
    x = Blocks(grid)

    def split(tokens):
        return [dict(enumerate(part)) for part in tokens.split(stride)]

    def row(i, queries, keys):
        shares = torch.zeros(len(keys), dtype=torch.float64)
        for query in split(queries[i]):
            weights = torch.zeros(len(keys), dtype=torch.float64)
            for j in filter(lambda j: x.sees(i, j), range(len(keys))):
                for key in split(keys[j]):
                    both = [s for s in key if stride - 1 - s in query]
                    score = sum(float(query[stride - 1 - s] @ key[s]) for s in both)
                    weights[j] += torch.tensor(score * x.scale / stride).double().exp()
            shares += weights / weights.sum()
        return shares / len(split(queries[i]))

    expected = x.by_rows(row, x.q, x.k)
    scores = score_antidiagonals(x.q, x.k, x.counts, stride=stride, allowed=x.allowed)
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-7)


def test_antidiagonals_of_one_token_are_exact_attention(grid):
    x = Blocks(grid)
    scores = score_antidiagonals(x.q, x.k, x.counts, stride=1, allowed=x.allowed)
    torch.testing.assert_close(scores, exact_mass(x.q, x.k, x.counts, allowed=x.allowed))


@pytest.mark.parametrize("score", [score_cells, score_cell_mass])
def test_cells_must_divide_blocks(score):
    x = Blocks(GRIDS["exact"])
    with pytest.raises(ValueError, match="got cells of 5 tokens for blocks of 16"):
        score(x.q, x.k, x.counts, cell_tokens=5)


def test_likeness_less_redundancy(grid):
    x = Blocks(grid)

    def cosine(a, b):
        return (a @ b / a.norm() / b.norm() + 1) / 2

    def row(i, queries, keys):
        means = [key.mean(0) for key in keys]
        out = torch.full((len(keys),), -float("inf"), dtype=torch.float64)
        for j in filter(lambda j: x.sees(i, j), range(len(keys))):
            others = [
                cosine(means[j], means[o]) for o in range(len(keys)) if o != j and x.sees(j, o)
            ]
            redundancy = sum(others) / max(1, len(others))
            out[j] = 0.7 * cosine(queries[i].mean(0), means[j]) - 0.3 * redundancy
        return out

    expected = x.by_rows(row, x.q, x.k)
    torch.testing.assert_close(score_novelty(x.q, x.k, x.counts, allowed=x.allowed), expected)


def test_self_similarity_is_the_mean_cosine_of_all_pairs(grid):
    x = Blocks(grid)

    def formula(q, k):
        cosines = [a @ b / a.norm() / b.norm() for a in k for b in k]
        return sum(cosines) / len(cosines)

    expected = x.pairs(formula, x.q, x.k)[:, :, 0]
    torch.testing.assert_close(self_similarity(x.k, x.counts), expected)
    zeros = torch.zeros_like(x.k)
    assert (self_similarity(zeros, x.counts) == 0).all()


def test_exact_mass_is_the_mean_of_softmax_rows(grid):
    x = Blocks(grid)

    def row(i, queries, keys):
        sums = torch.stack(
            [
                (queries[i] @ key.T * x.scale).exp().sum(-1) * x.sees(i, j)
                for j, key in enumerate(keys)
            ]
        )
        return (sums / sums.sum(0)).mean(-1)

    mass = exact_mass(x.q, x.k, x.counts, allowed=x.allowed)
    torch.testing.assert_close(mass, x.by_rows(row, x.q, x.k))
    torch.testing.assert_close(mass.sum(-1), torch.ones_like(mass[..., 0]))


def test_log_sum_exp_over_single_tokens_is_exact_mass_where_rows_are_alike():
    """With one query for all tokens of a block, both order its key blocks alike."""
    x = Blocks(GRIDS["ragged"])
    means = pool_blocks(x.q, x.counts)
    q = torch.where(x.q == 0, 0, means.repeat_interleave(x.size, dim=-2))
    scores = score_cells(q, x.k, x.counts, cell_tokens=1).softmax(-1)
    torch.testing.assert_close(scores, exact_mass(q, x.k, x.counts))


@pytest.mark.parametrize("tail", [None, "mean", "first"])
def test_exact_residual_is_what_dropping_one_block_moves(grid, tail):
    """Dropping block j moves the output by r_j Z / Z', with Z' the denominator that is left."""
    x = Blocks(grid, heads=1)

    def row(i, queries, keys, values):
        seen = [j for j in range(len(keys)) if x.sees(i, j)]
        tokens = sum(len(keys[j]) for j in seen)
        slopes = [keys[j].T @ (values[j] - values[j].mean(0)) for j in seen]
        slope = sum(slopes) / tokens
        out = torch.zeros(len(keys), dtype=torch.float64)
        for query in queries[i] * x.scale:
            parts = {j: (query @ keys[j].T).exp() for j in seen}
            z = sum(part.sum() for part in parts.values())
            dense = sum(part @ values[j] for j, part in parts.items()) / z
            for j in seen:
                weight = len(keys[j]) * (query @ keys[j].mean(0)).exp() * (tail is not None)
                value = values[j].mean(0) + (query @ slope if tail == "first" else 0)
                numerator = weight * value + sum(parts[o] @ values[o] for o in seen if o != j)
                left = weight + sum(parts[o].sum() for o in seen if o != j)
                out[j] += ((numerator / left - dense) * left / z).square().sum()
        return out / len(queries[i])

    residual = exact_residual(x.q, x.k, x.v, x.counts, tail=tail, allowed=x.allowed)
    assert (
        (torch.zeros_like(residual) == residual)[..., ~x.allowed].all() if grid.segments else True
    )
    torch.testing.assert_close(residual, x.by_rows(row, x.q, x.k, x.v))


def test_a_summary_leaves_no_residual_where_keys_of_a_block_are_equal():
    x = Blocks(GRIDS["ragged"])
    means = pool_blocks(x.k, x.counts)
    k = torch.where(x.k == 0, 0, means.repeat_interleave(x.size, dim=-2))
    assert exact_residual(x.q, k, x.v, x.counts, tail="mean").max() < 1e-20
    assert exact_residual(x.q, k, x.v, x.counts).max() > 1e-4


@pytest.mark.parametrize("tail", [None, "mean", "first"])
def test_sums_of_blocks_give_the_output_of_every_map_and_tail(grid, tail):
    x = Blocks(grid)
    q, k, v = (na.to_raster(y, grid) for y in (x.q, x.k, x.v))
    algorithm = "topk-0.3" + (f"_tail-{tail}" if tail else "")
    out = na.to_blocks(na.nabla_attention(q, k, v, grid, algorithm, backend="reference"), grid)
    mask = na.build_block_map(q, k, grid, algorithm).mask
    for head in range(2):
        for i, query in enumerate(x.lists(x.q, 0, head)):
            seen = None if x.allowed is None else x.allowed[i]
            sums = sum_blocks(
                query, x.k[0, head], x.v[0, head], x.counts, scale=x.scale, allowed=seen
            )
            found = sums.attend(mask[0, head, i].expand(len(query), -1), tail)
            torch.testing.assert_close(found, x.lists(out, 0, head)[i])


def test_an_unknown_tail_has_no_residual():
    x = Blocks(GRIDS["exact"])
    with pytest.raises(ValueError, match="unknown tail 'second'"):
        exact_residual(x.q, x.k, x.v, x.counts, tail="second")


SCORES = {
    "first-order": lambda q, k, v, n: score_first_order(q, k, v, n),
    "centroid": lambda q, k, v, n: score_centroid_error(q, k, v, n),
    "cells": lambda q, k, v, n: score_cells(q, k, n, cell_tokens=4),
    "cell-mass": lambda q, k, v, n: score_cell_mass(q, k, n, cell_tokens=4),
    "antidiagonals": lambda q, k, v, n: score_antidiagonals(q, k, n, stride=4),
    "novelty": lambda q, k, v, n: score_novelty(q, k, n),
    "similarity": lambda q, k, v, n: self_similarity(k, n),
    "mass": lambda q, k, v, n: exact_mass(q, k, n),
    "residual": lambda q, k, v, n: exact_residual(q, k, v, n, tail="first"),
}


@pytest.mark.parametrize("name", SCORES)
def test_panels_and_head_order_change_nothing(name, monkeypatch):
    x = Blocks(GRIDS["ragged"])
    panels = SCORES[name](x.q, x.k, x.v, x.counts)
    for room in (estimates, exact):
        monkeypatch.setattr(room, "PANEL_VALUES", 2**25)
    torch.testing.assert_close(SCORES[name](x.q, x.k, x.v, x.counts), panels)
    flipped = SCORES[name](*(y.flip(1) for y in (x.q, x.k, x.v)), x.counts)
    torch.testing.assert_close(flipped.flip(1), panels)


@pytest.mark.parametrize("name", SCORES)
def test_scores_of_rounded_tokens_are_in_fp32_whatever_autocast_says(name):
    x = Blocks(GRIDS["ragged"], dtype=torch.bfloat16)
    inputs = x.q, x.k, x.v
    plain = SCORES[name](*inputs, x.counts)
    exact = SCORES[name](*(y.double() for y in inputs), x.counts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(SCORES[name](*inputs, x.counts), plain)
    assert plain.dtype == (torch.float64 if name in ("mass", "residual") else torch.float32)
    torch.testing.assert_close(plain.double(), exact, rtol=1e-4, atol=1e-4)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in self.inputs:
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("name", SCORES)
def test_memory_does_not_grow_with_heads(name):
    """Nothing is larger than the result, the tokens of one head, or the means of cells of four."""
    x = Blocks(GRIDS["exact"], heads=24, dim=32)
    with Largest() as seen:
        seen.inputs = {y.untyped_storage().data_ptr() for y in (x.q, x.k, x.v)}
        out = SCORES[name](x.q, x.k, x.v, x.counts)
    assert seen.numel <= max(out.numel(), x.q[0, 0].numel(), x.q.numel() // 4)
