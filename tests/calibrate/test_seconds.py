"""The table of attention's seconds, and schedules within seconds; nothing is timed here."""

import itertools

import numpy as np
import pytest
import torch

from nabla_attn import parse
from nabla_attn.calibrate import budget as budget_module
from nabla_attn.calibrate import seconds as seconds_module
from nabla_attn.calibrate.budget import Budget
from nabla_attn.calibrate.candidates import SeenCalls, read_candidates
from nabla_attn.calibrate.job import CalibrateJob
from nabla_attn.calibrate.run import Calibration
from nabla_attn.calibrate.seconds import SecondsTable
from nabla_attn.generation.pipeline import load_pipeline
from nabla_attn.generation.request import GenerationRequest

SEEN = SeenCalls(calls=4, batch=1, heads=3, dim=8, text=(0, 0), tokens=(2, 8, 8), dtype="float32")
CANDIDATES = read_candidates(["topk-0.1", "nabla-0.3_tail-first"])


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("NABLA_ATTN_CACHE", str(tmp_path))


def model_of_seconds(rules, heads, share):
    """A machine: a call costs 1, a head 1 and its pairs 10; a tail 2 a head more."""
    if rules == "dense":
        return 1 + 12 * heads
    return 1 + heads * (1 + 10 * share + (2 if "tail" in rules else 0))


@pytest.fixture
def machine(monkeypatch):
    timed = []

    def measure(self, point):
        timed.append(point)
        return model_of_seconds(*point)

    monkeypatch.setattr(SecondsTable, "_time", measure)
    return timed


def table(**changes):
    return SecondsTable(SEEN, torch.device("cpu"), **changes)


def test_points_are_measured_once_and_lines_drawn_between(machine):
    first = table()
    first.measure(CANDIDATES, on_point=lambda done, total: None)
    # Dense, and two kinds of sparse at three densities, for one head and all.
    assert len(machine) == 2 + 2 * 2 * 3
    again = table()
    again.measure(CANDIDATES, on_point=lambda done, total: None)
    assert len(machine) == 14 and again.points == first.points
    for heads, share in itertools.product((1, 2, 3), (0.02, 0.13, 0.4, 0.8)):
        found = again.seconds(parse("topk-0.7"), share, heads)
        assert found == pytest.approx(model_of_seconds("topk", heads, share))
        # Densities count a summary of 1/64 for what is dropped.
        kept = again.seconds(parse("nabla-0.2_tail-first"), share + (1 - share) / 64, heads)
        assert kept == pytest.approx(model_of_seconds("topk_tail", heads, share))
        assert again.seconds(parse("dense"), 1.0, heads) == model_of_seconds("dense", heads, 1)
    table(backend="reference").measure(CANDIDATES[:1], on_point=lambda done, total: None)
    assert len(machine) > 14


def test_groups_of_heads_are_calls_of_their_own(machine):
    mine = table()
    mine.measure(CANDIDATES, on_point=lambda done, total: None)
    density = np.full((2, 1, 3, 3), 0.3)
    picked = np.array([[[0, 0, 2]], [[0, 0, 0]]])
    expected = 2 * (
        model_of_seconds("topk", 2, 0.3)
        + model_of_seconds("dense", 1, 1)
        + model_of_seconds("topk", 3, 0.3)
    )
    assert mine.of_choice(CANDIDATES, density, picked) == pytest.approx(expected)
    by_candidate = mine.by_candidate(CANDIDATES, density)
    assert by_candidate[..., 0].sum() == pytest.approx(4 * model_of_seconds("topk", 3, 0.3))


def test_a_broken_table_is_named(machine):
    path = table().path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    with pytest.raises(ValueError, match="attention-seconds"):
        table()


def test_points_are_timed_on_real_calls(monkeypatch):
    calls = []
    original = seconds_module.attend

    def attend(q, *args, **options):
        calls.append(q.shape)
        return original(q, *args, **options)

    monkeypatch.setattr(seconds_module, "attend", attend)
    mine = table()
    mine.measure(CANDIDATES[-1:], on_point=lambda done, total: None)
    assert set(calls) == {(1, 1, 128, 8), (1, 3, 128, 8)}
    assert all(seconds > 0 for seconds in mine.points.values())


def test_a_schedule_within_seconds_beside_that_of_a_density(
    machine, tiny_wan, tmp_path, monkeypatch
):
    pipeline = load_pipeline(tiny_wan, device="cpu", dtype="float32")
    request = GenerationRequest(prompt="red", height=144, width=176, frames=5, steps=2)
    candidates = read_candidates(["topk-*", "topk-*_tail-first"])
    calibration = Calibration(pipeline, request, candidates, tmp_path)
    # The transformer takes 50 beside attention: 4 calls of 2 layers of 2 heads.
    dense = 50 + 8 * model_of_seconds("dense", 2, 1)
    monkeypatch.setattr(budget_module, "final_latents", lambda *args: (None, dense))
    monkeypatch.setattr(budget_module, "warm_up", lambda *args: None)
    result = CalibrateJob(calibration, ["red"], Budget(seconds=200.0), ranges=2).run()
    mine, other = (result.timed[name] for name in ("this schedule", "by density, as many seconds"))
    assert mine.predicted <= 200 * 1.002 and mine.measured == dense
    assert 0.5 * mine.predicted < other.predicted <= mine.predicted
    assert mine.choice.error <= other.choice.error
    half = CalibrateJob(calibration, ["red"], Budget(speed_up=1.25), ranges=2).run()
    assert half.timed["this schedule"].predicted <= dense / 1.25 * 1.002
    with pytest.raises(ValueError, match="everything but attention 50"):
        CalibrateJob(calibration, ["red"], Budget(seconds=60.0)).run()
