"""The leaderboard: knobs reach densities, measures equal their definitions, runs resume."""

from dataclasses import replace

import pytest
import torch
from tests.oracle import random_qkv

import nabla_attn as na
from nabla_attn.core.order import TokenLayout
from nabla_attn.evaluation import calls as calls_module
from nabla_attn.evaluation.calls import Call, add_call
from nabla_attn.evaluation.knobs import Knob
from nabla_attn.evaluation.leaderboard import Leaderboard, rows_of
from nabla_attn.evaluation.measuring import (
    REFERENCE,
    Runner,
    density_of,
    measure_together,
    summarise,
)
from nabla_attn.evaluation.model_calls import ModelCalls, pick_layers
from nabla_attn.generation.pipeline import load_pipeline
from nabla_attn.generation.request import GenerationRequest
from nabla_attn.methods import Moment
from nabla_attn.methods.calibration import TableMaker
from nabla_attn.methods.contract import TooManyTokensError
from nabla_attn.record import RunRecord

GRID = na.TokenGrid(4, 16, 24, block=na.BlockShape(1, 4, 4))

COARSE = dict.fromkeys(("sta", "lite", "chipmunk"), 0.12)


def series(steps=3, grid=GRID):
    calls = []
    for step in range(steps):
        torch.manual_seed(step)
        q, k, v = (x[:1].float() for x in random_qkv(grid))
        # A layer that no method leaves dense.
        moment = Moment(step=step, num_steps=steps, layer=4, num_layers=6)
        calls.append(Call(q / 2, k / 2, v, TokenLayout(grid), moment))
    return calls


def measure(algorithm, call, tables=None):
    return Runner(na.parse(algorithm), tables).measure(call)


@pytest.mark.parametrize("name", ["nabla", "topk", "sta", "sol", "lite", "minference", "chipmunk"])
def test_a_knob_reaches_a_density(name):
    # Of six steps, as chipmunk keeps everything in the first.
    calls = series(6)
    found = Knob(name, lambda config: density_of(config, [calls], None)).set(0.3)
    assert found.density == pytest.approx(0.3, abs=COARSE.get(name, 0.03))
    again = density_of(na.parse(found.algorithm), [calls], None)
    assert again == pytest.approx(found.density)


def test_a_knob_tries_no_value_twice():
    tried = []
    knob = Knob("sta", lambda config: tried.append(str(config)) or 0.1)
    assert [knob.set(wanted).wanted for wanted in (0.1, 0.3)] == [0.1, 0.3]
    assert len(tried) == len(set(tried)) > 1


def test_numbers_behind_a_method_stay_and_the_first_is_the_knob():
    shares = {}

    def density(config):
        (use,) = config.uses
        return shares.setdefault(str(config), use.values[0])

    found = Knob("svg2-queries=4-keys=6", density).set(0.3)
    assert found.method == "svg2-queries=4-keys=6"
    assert na.parse(found.algorithm).uses[0].values[1:3] == (4, 6)
    assert found.density == pytest.approx(0.3, rel=0.02)
    with pytest.raises(ValueError, match="'cluster'"):
        Knob("svg2-cluster=4", density).set(0.3)
    with pytest.raises(ValueError, match="no method 'svg9'"):
        Knob("svg9-keys=4", density)


def test_a_knob_says_why_no_value_is_taken():
    def refuse(config):
        raise ValueError("frames must be even")

    with pytest.raises(ValueError, match="frames must be even"):
        Knob("topk", refuse).set(0.1)


def test_measures_are_what_they_say():
    (call,) = series(1)
    found = measure("topk-0.3", call)
    out = na.nabla_attention(call.q, call.k, call.v, GRID, "topk-0.3")
    exact = torch.nn.functional.scaled_dot_product_attention(call.q, call.k, call.v)
    errors = (out - exact).flatten(2).norm(dim=2) / exact.flatten(2).norm(dim=2)
    torch.testing.assert_close(found.error, errors[0], rtol=1e-4, atol=0)
    distance = (out - exact).square().mean(dim=(0, 2, 3)).sqrt()
    torch.testing.assert_close(found.distance, distance, rtol=1e-4, atol=0)
    bmap = na.build_block_map(call.q, call.k, GRID, "topk-0.3")
    assert found.density == pytest.approx(bmap.density)
    everything = measure("nabla-1", call)
    assert everything.error.max() < 1e-5
    torch.testing.assert_close(everything.recall, torch.ones(call.q.shape[1]))
    assert found.density < found.recall.min() and found.recall.max() < 1
    assert 0 < found.select_seconds < found.seconds
    dense = measure("dense", call)
    assert dense.error.max() == 0 and dense.density == 1 and dense.seconds > 0


def test_recall_is_that_of_exact_attention(monkeypatch):
    (call,) = series(1)
    monkeypatch.setattr(calls_module, "PANEL_VALUES", 7 * GRID.num_tokens)
    probs = (call.q[0] @ call.k[0].mT * call.q.shape[-1] ** -0.5).softmax(dim=-1)
    bmap = na.build_block_map(call.q, call.k, GRID, "topk-0.3")
    slots = na.to_blocks(torch.arange(GRID.num_tokens)[None], GRID, dim=1)[0]
    kept = torch.zeros_like(probs)
    pairs = bmap.mask[0].repeat_interleave(16, 1).repeat_interleave(16, 2)
    kept[:, slots[:, None], slots] = pairs.float()
    wanted = (probs * kept).sum(dim=-1).mean(dim=-1)
    torch.testing.assert_close(measure("topk-0.3", call).recall, wanted)


def test_recall_of_sampled_rows_is_near_that_of_all(monkeypatch):
    (call,) = series(1)
    whole = measure("topk-0.3", call).recall
    monkeypatch.setattr(calls_module, "MASS_ROWS", 400)
    (again,) = series(1)
    assert len(again.rows) == 400 < GRID.num_tokens
    torch.testing.assert_close(measure("topk-0.3", again).recall, whole, rtol=0.05, atol=0)


def test_mass_in_orders_of_heads():
    (call,) = series(1, grid=na.TokenGrid(2, 8, 12, block=na.BlockShape(1, 4, 4)))
    for algorithm in ("bsa-1", "chipmunk-1-0-0"):
        found = measure(algorithm, call)
        torch.testing.assert_close(found.recall, torch.ones(call.q.shape[1]), rtol=1e-4, atol=0)


def test_summaries_of_a_tail_count_as_density():
    (call,) = series(1)
    plain, tailed = (measure(f"topk-0.3{tail}", call) for tail in ("", "_tail-mean"))
    assert tailed.density > plain.density
    torch.testing.assert_close(tailed.recall, plain.recall)


def test_text_beside_the_video_is_attended_and_not_judged():
    (plain,) = series(1)
    text = torch.randn(3, 1, plain.q.shape[1], 5, plain.q.shape[-1])
    joined = [
        torch.cat(pair, dim=2) for pair in zip((plain.q, plain.k, plain.v), text, strict=True)
    ]
    layout = TokenLayout(GRID, text_after=5)
    valid = torch.tensor([[True, True, True, False, False]])
    call = Call(*joined, layout, plain.moment, text_valid=valid)
    whole = measure("nabla-1", call)
    assert whole.error.max() < 1e-5
    torch.testing.assert_close(whole.recall, torch.ones(call.q.shape[1]))
    assert call.dense.shape[1] == GRID.num_tokens * plain.q.shape[-1]
    assert measure("topk-0.3", call).recall.min() > 0.3


def test_algorithms_are_measured_in_turn_beside_a_reference():
    calls = series(4)
    names = [f"head {index}" for index in range(calls[0].q.shape[1])]
    configs = [na.parse("topk-0.2"), na.parse("topk-0.6")]
    few, many = measure_together(configs, [calls], head_names=names)
    assert few["reference_seconds"] == many["reference_seconds"] > 0
    assert few["density"] < many["density"] and few["error"] > many["error"]
    assert few["error_worst_head"] >= few["error"] >= sum(few["error_of_heads"].values()) / 10
    assert few["recall_worst_head"] <= few["recall"]
    assert few["error"] == pytest.approx((few["error_early"] + few["error_late"]) / 2, abs=1e-6)
    assert list(few["error_of_heads"]) == names
    alone = [Runner(configs[0]).measure(call) for call in calls]
    again = summarise(list(zip(calls, alone, strict=True)), ())
    assert again["error_late"] == few["error_late"] and "error_of_heads" not in again


def test_what_a_method_keeps_between_steps_follows_a_series():
    calls = series(3)
    (found,) = measure_together([na.parse("losa-0.3-0")], [calls])
    runner = Runner(na.parse("losa-0.3-0"))
    assert found["density"] == pytest.approx(
        sum(runner.measure(call).density for call in calls) / 3, abs=1e-6
    )


def entry(error, seconds, reference):
    return {
        "density": 0.5,
        "recall": 0.5,
        "error": error,
        "select_seconds": seconds / 2,
        "seconds": seconds,
        "reference_seconds": reference,
    }


def record(**algorithms):
    numbers = {"algorithms": algorithms}
    return RunRecord("leaderboard", {}, 0, {}, "cpu", numbers)


def test_seconds_compare_by_their_reference():
    # The machine was half as fast while the second prompt's "a" was measured.
    first = record(dense=entry(0.0, 4.0, 1.0), a=entry(0.1, 2.5, 1.0))
    second = record(dense=entry(0.0, 4.0, 1.0), a=entry(0.3, 5.0, 2.0), b=entry(0.3, 5.0, 2.0))
    dense, row = rows_of([first, second])
    assert row["algorithm"] == "a" and row["seconds"] == pytest.approx(2.5)
    assert row["select_seconds"] == pytest.approx(1.25)
    assert row["error"] == pytest.approx(0.2) and row["errors"] == [0.1, 0.3]
    assert row["ideal"] == pytest.approx(4.0 * 0.5 / 2.5) and dense["ideal"] == pytest.approx(0.5)


def test_records_without_a_reference_are_still_read():
    plain = {key: value for key, value in entry(0.1, 2.0, 1.0).items() if "reference" not in key}
    (row,) = rows_of([record(a=plain), record(a=plain | {"seconds": 4.0})])
    assert row["seconds"] == pytest.approx(3.0) and row["ideal"] is None


def test_layers_and_branches_come_in_turn():
    for depth in (3, 5, 6, 30):
        seen = [pair for number in range(depth) for pair in pick_layers(number, depth)]
        assert sorted(seen) == [(layer, branch) for layer in range(depth) for branch in (0, 1)]


def test_a_table_is_made_of_calls_that_are_not_measured():
    grid = na.TokenGrid(2, 8, 12, block=na.BlockShape(1, 4, 4))
    config = na.parse("vdit-0.3")
    maker = TableMaker(config.uses)
    for call in series(3, grid):
        add_call(maker, call, config)
    tables = {"vdit": maker.entries()}
    (found,) = measure_together([config], [series(3, grid)], tables=[tables])
    assert 0 < found["density"] < 1 and 0 < found["error"] < 2


REQUEST = GenerationRequest(prompt="", height=144, width=176, frames=5, steps=2)


def test_a_run_goes_on_where_it_stopped(tiny_wan, tmp_path):
    pipeline = load_pipeline(tiny_wan, device="cpu", dtype="float32")
    source = ModelCalls(pipeline, REQUEST, ["red", "blue"])
    told = []
    board = Leaderboard(source, tmp_path, names=["topk"], densities=[0.5])
    records = board.measure(2, on_progress=lambda *stage: told.append(stage))
    assert told == [("methods", done, 4) for done in (1, 2, 3, 4)]
    assert records[0].numbers["reference"] == REFERENCE
    dense, row = rows_of(records)
    assert dense["algorithm"] == "dense" and dense["error"] == 0
    assert row["algorithm"].startswith("topk-") and row["prompts"] == 2 and row["error"] > 0
    again = Leaderboard(source, tmp_path, names=["topk", "nabla"], densities=[0.5])
    more = again.measure(2, on_progress=lambda *stage: None)
    names = {row["algorithm"].split("-")[0] for row in rows_of(more)}
    assert names == {"dense", "topk", "nabla"}
    kept = more[0].numbers["algorithms"][row["algorithm"]]
    assert kept == records[0].numbers["algorithms"][row["algorithm"]]
    denser = Leaderboard(source, tmp_path, names=["topk"], densities=[0.5, 0.9])
    assert [each.wanted for each in denser.settings()] == [0.5, 0.9]
    other = Leaderboard(ModelCalls(pipeline, REQUEST, ["green"]), tmp_path, names=["topk"])
    with pytest.raises(ValueError, match="made with other settings: prompt"):
        other.measure(1, on_progress=lambda *stage: None)


def test_a_method_that_takes_none_of_the_calls_is_left_out_with_the_reason(
    tiny_wan, tmp_path, monkeypatch
):
    monkeypatch.setattr(na.methods, "_OWN", {})
    pipeline = load_pipeline(tiny_wan, device="cpu", dtype="float32")
    source = ModelCalls(pipeline, REQUEST, ["red"])

    @na.register_method("refuses", parameters=[])
    def refuses(q, k, grid, params, state):
        """Nothing."""
        raise ValueError("takes no frames")

    board = Leaderboard(source, tmp_path, names=["refuses", "sta"], densities=[0.5])
    with pytest.warns(UserWarning, match="refuses is left out: takes no frames"):
        (found,) = board.settings()
    assert found.method == "sta"


def test_a_table_is_calibrated_on_a_dense_video(tiny_wan, tmp_path):
    pipeline = load_pipeline(tiny_wan, device="cpu", dtype="float32")
    source = ModelCalls(pipeline, REQUEST, ["red"], table_prompt="blue")
    board = Leaderboard(source, tmp_path, names=["vdit"], densities=[0.5])
    (record,) = board.measure(1, on_progress=lambda *stage: None)
    found = {row["algorithm"].split("-")[0] for row in rows_of([record])}
    assert found == {"dense", "vdit"}


def test_a_method_that_calibrates_on_short_videos_gets_one(monkeypatch):
    tried = []

    def run(self, frames, prompt, observer):
        tried.append((frames, prompt))
        if frames > 9:
            raise TooManyTokensError("too long")

    source = ModelCalls.__new__(ModelCalls)
    source._request, source._table_prompt = replace(REQUEST, frames=33), "blue"
    monkeypatch.setattr(ModelCalls, "_run", run)
    assert source.make_tables(na.parse("dam-0.3")) == {"dam": {}}
    assert tried == [(33, "blue"), (17, "blue"), (9, "blue")]
