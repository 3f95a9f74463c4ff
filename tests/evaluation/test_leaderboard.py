"""The leaderboard: knobs reach densities, measures equal their definitions, runs resume."""

import pytest
import torch
from tests.oracle import random_qkv

import nabla_attn as na
from nabla_attn.core.order import TokenLayout
from nabla_attn.evaluation.leaderboard import (
    Call,
    Leaderboard,
    densities_of,
    mass_of,
    measure,
    rows_of,
    set_knob,
)
from nabla_attn.generation.pipeline import load_pipeline
from nabla_attn.generation.request import GenerationRequest
from nabla_attn.methods import Moment

GRID = na.TokenGrid(4, 16, 24, block=na.BlockShape(1, 4, 4))


def series(steps=3, grid=GRID):
    calls = []
    for step in range(steps):
        torch.manual_seed(step)
        q, k, v = (x[:1].float() for x in random_qkv(grid))
        calls.append(Call(q / 2, k / 2, v, grid, Moment(step=step, num_steps=steps)))
    return calls


@pytest.mark.parametrize("name", ["nabla", "topk", "sta", "sol", "lite"])
def test_a_knob_reaches_a_density(name):
    calls = series()
    found = set_knob(name, 0.3, lambda config: densities_of(config, calls))
    assert found.density == pytest.approx(0.3, abs=0.12 if name in ("sta", "lite") else 0.03)
    assert densities_of(na.parse(found.algorithm), calls) == pytest.approx(found.density)


def test_measures_are_what_they_say():
    (call,) = series(1)
    (found,) = measure(na.parse("topk-0.3"), [call])
    out = na.nabla_attention(call.q, call.k, call.v, GRID, "topk-0.3")
    exact = torch.nn.functional.scaled_dot_product_attention(call.q, call.k, call.v)
    errors = (out - exact).flatten(2).norm(dim=2) / exact.flatten(2).norm(dim=2)
    assert found.error == pytest.approx(errors.mean().item(), rel=1e-4)
    bmap = na.build_block_map(call.q, call.k, GRID, "topk-0.3")
    assert found.density == pytest.approx(bmap.density)
    whole = na.build_block_map(call.q, call.k, GRID, "topk-1")
    assert mass_of(whole, TokenLayout(GRID), call) == pytest.approx(1, abs=1e-5)
    assert found.density < found.recall < 1 and 0 < found.select_seconds < found.seconds
    (all_of_it,) = measure(na.parse("nabla-1"), [call])
    assert all_of_it.error < 1e-5 and all_of_it.recall == pytest.approx(1, abs=1e-5)


def test_mass_in_orders_of_heads():
    (call,) = series(1, grid=na.TokenGrid(2, 8, 12, block=na.BlockShape(1, 4, 4)))
    for algorithm in ("bsa-1", "chipmunk-1-0-0"):
        (found,) = measure(na.parse(algorithm), [call])
        assert found.recall == pytest.approx(1, abs=1e-4), algorithm


def test_summaries_of_a_tail_count_as_density():
    (call,) = series(1)
    plain, tailed = (measure(na.parse(f"topk-0.3{tail}"), [call])[0] for tail in ("", "_tail-mean"))
    assert tailed.density > plain.density and tailed.recall == pytest.approx(plain.recall)


def test_a_run_goes_on_where_it_stopped(tiny_wan, tmp_path):
    pipeline = load_pipeline(tiny_wan, device="cpu", dtype="float32")
    request = GenerationRequest(prompt="red", height=144, width=176, frames=5, steps=2)
    options = {"names": ["topk"], "densities": [0.5]}
    board = Leaderboard(pipeline, request, tmp_path, **options)
    told = []
    records = board.measure(["red", "blue"], on_progress=lambda *stage: told.append(stage))
    assert told == [("prompts", 1, 2), ("prompts", 2, 2)]
    (row,) = rows_of(records)
    assert row["algorithm"].startswith("topk-") and row["prompts"] == 2 and row["error"] > 0
    again = Leaderboard(pipeline, request, tmp_path, names=["topk", "nabla"], densities=[0.5])
    more = again.measure(["red", "blue"], on_progress=lambda *stage: None)
    assert {row["algorithm"].split("-")[0] for row in rows_of(more)} == {"topk", "nabla"}
    kept = more[0].numbers["algorithms"][row["algorithm"]]
    assert kept == records[0].numbers["algorithms"][row["algorithm"]]
    denser = Leaderboard(pipeline, request, tmp_path, names=["topk"], densities=[0.5, 0.9])
    assert [each.wanted for each in denser.settings("red")] == [0.5, 0.9]
    other = Leaderboard(pipeline, request, tmp_path, **options)
    with pytest.raises(ValueError, match="made with other settings: prompt"):
        other.measure(["green"], on_progress=lambda *stage: None)
