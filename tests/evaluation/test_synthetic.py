"""The synthetic set: the same every time, as local as its heads are called."""

import pytest
import torch

import nabla_attn as na
from nabla_attn.evaluation import calls
from nabla_attn.evaluation.calls import Call
from nabla_attn.evaluation.leaderboard import Leaderboard, rows_of
from nabla_attn.evaluation.synthetic import (
    DIM,
    GAIN,
    GRID,
    LAYERS,
    SyntheticCalls,
    fourier,
    locality,
    record_locality,
)
from nabla_attn.record import RunRecord

SMALL = SyntheticCalls(grid=na.TokenGrid(6, 16, 24), dim=64, steps=2)


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(calls, "MASS_ROWS", 300)


def test_it_is_shaped_like_a_large_model():
    assert (GRID.frames, GRID.height, GRID.width, DIM) == (20, 30, 52, 128)
    assert SyntheticCalls().describe(0)["tokens"] == [20, 30, 52]


def test_samples_follow_from_their_number():
    (first,), (again,), (other,) = (SMALL.collect(number) for number in (0, 0, 1))
    assert torch.equal(first[1].q, again[1].q) and torch.equal(first[1].v, again[1].v)
    assert not torch.equal(first[1].q, other[1].q)
    assert [call.moment.step for call in first] == [0, 1]
    assert (first[0].moment.layer, other[0].moment.layer) == LAYERS[:2]
    assert {layer % 3 for layer in LAYERS} == {0, 1, 2} == {layer % 2 for layer in LAYERS} | {2}


def test_products_of_features_are_bell_curves():
    place = torch.linspace(0, 3, 7)[:, None]
    features = fourier(place, 200_000, torch.Generator().manual_seed(0))
    found = features @ features.T / 200_000
    torch.testing.assert_close(found, (-((place - place.T) ** 2) / 2).exp(), rtol=0, atol=0.02)


def test_heads_are_what_they_are_called():
    (series,) = SMALL.collect(0)
    heads = [dict(zip(SMALL.heads, locality(call), strict=True)) for call in series]
    first, last = heads
    assert last["local"]["near"] > 2 * last["temporal"]["near"]
    assert last["temporal"]["same_place"] > 2 * last["local"]["same_place"]
    assert last["temporal"]["same_place"] > 2 * last["global"]["same_place"]
    for name, numbers in last.items():
        assert numbers["entropy"] < first[name]["entropy"] < numbers["uniform"]
        assert numbers["top_1"] < numbers["top_5"] < numbers["top_10"] < numbers["top_20"] < 1
    scores = (series[0].q * series[0].k).sum(dim=-1).mean() / 64**0.5
    assert scores == pytest.approx(0.6 * GAIN, rel=0.1)


def test_locality_of_even_attention_is_known():
    (series,) = SMALL.collect(0)
    even = Call(series[0].q * 0, series[0].k, series[0].v, series[0].layout, series[0].moment)
    numbers = locality(even, near=(6, 16, 24))[0]
    assert numbers["entropy"] == pytest.approx(numbers["uniform"], abs=1e-3)
    assert numbers["near"] == pytest.approx(1) and numbers["same_place"] == pytest.approx(
        1 / 384, abs=1e-4
    )


def test_methods_are_measured_on_it(tmp_path):
    tiny = SyntheticCalls(grid=na.TokenGrid(2, 16, 16), dim=32, steps=2)
    board = Leaderboard(tiny, tmp_path, names=["topk", "vdit"], densities=[0.3])
    rows = rows_of(board.measure(1, on_progress=lambda *stage: None))
    assert [row["algorithm"].split("-")[0] for row in rows] == ["dense", "topk", "vdit"]
    assert set(rows[1]["error_of_heads"]) == {"local", "temporal", "global"}
    record_locality(tiny, tmp_path / "locality.json")
    record = RunRecord.load(tmp_path / "locality.json")
    assert record.numbers["steps"]["1"]["local"]["near"] > 0.1
    record_locality(tiny, tmp_path / "locality.json")
    assert RunRecord.load(tmp_path / "locality.json").created == record.created
    with pytest.raises(ValueError, match="other settings: steps"):
        record_locality(SyntheticCalls(grid=tiny.grid, dim=32), tmp_path / "locality.json")
