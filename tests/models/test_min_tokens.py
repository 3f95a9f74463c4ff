"""`min_tokens` of apply: a number, this machine's record, or the path of one."""

import warnings

import pytest
import torch
from tests.models.tiny_models import TINY, run

import nabla_attn as na
from nabla_attn import machine
from nabla_attn.machine import cache_folder
from nabla_attn.record import RunRecord

WAN = TINY["wan"]
GRID = (3, 11, 13)  # 429 tokens
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NABLA_ATTN_CACHE", str(tmp_path / "cache"))


def make_record(path, *, win_from):
    points = [
        {"tokens": tokens, "density": 0.2, "speed_up": 2.0 if tokens >= win_from else 0.5}
        for tokens in (256, 512, 1024)
    ]
    RunRecord(machine.CROSSOVER, {}, 0, {}, "cpu", {"results": points}).save(path)


@torch.no_grad()
def density(**options):
    model, inputs = WAN.build(), WAN.inputs(*GRID)
    with na.apply(model, "nabla-0.5", **options) as handle:
        run(model, inputs)
        return handle.report().mean_density


@pytest.mark.parametrize(("win_from", "is_dense"), [(256, False), (512, True), (9999, True)])
def test_auto_uses_this_machines_record(win_from, is_dense):
    make_record(machine.crossover_file(CPU), win_from=win_from)
    assert (density(min_tokens="auto") == 1) == is_dense


def test_auto_without_a_record_warns_once_and_keeps_the_default():
    with pytest.warns(UserWarning, match=r"got none at .*crossover_.*; using 0\."):
        assert density(min_tokens="auto") < 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert density(min_tokens="auto") < 1
    rules = na.Schedule(algorithm=na.parse("nabla-0.5"), min_tokens=430)
    with pytest.warns(UserWarning, match="using 430"):
        assert density(min_tokens="auto", schedule=rules) == 1


@pytest.mark.filterwarnings("ignore:min_tokens")
def test_a_record_made_later_in_the_same_process_counts():
    assert density(min_tokens="auto") < 1
    make_record(machine.crossover_file(CPU), win_from=512)
    assert density(min_tokens="auto") == 1


@pytest.mark.filterwarnings("ignore:min_tokens")
def test_a_cache_that_cannot_be_reached_has_no_record(monkeypatch):
    # As in the home of another user: not a missing file, but an error of the system.
    monkeypatch.setenv("NABLA_ATTN_CACHE", "/" + "x" * 5000)
    assert density(min_tokens="auto") < 1


def test_numbers_and_paths(tmp_path):
    assert density(min_tokens=430) == 1 and density(min_tokens=429) < 1
    make_record(tmp_path / "mine.json", win_from=512)
    assert density(min_tokens=str(tmp_path / "mine.json")) == 1
    assert density(min_tokens=tmp_path / "mine.json") == 1


def test_what_is_not_a_record_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"crossover record .*none.json: No such file"):
        density(min_tokens=str(tmp_path / "none.json"))
    RunRecord("bench", {}, 0, {}, "cpu", {}).save(tmp_path / "other.json")
    with pytest.raises(ValueError, match=r"other.json is not a record .*its kind is 'bench'"):
        density(min_tokens=tmp_path / "other.json")
    with pytest.raises(ValueError, match="min_tokens must be a whole number, 0 or more: got True"):
        density(min_tokens=True)


def test_lengths_at_which_sparse_never_won_stay_dense(tmp_path):
    make_record(tmp_path / "never.json", win_from=9999)
    assert machine.load_min_tokens(tmp_path / "never.json") == 1025


def test_cache_folder(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("NABLA_ATTN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "nabla-attn"


def test_the_benchmark_writes_it(monkeypatch, tmp_path):
    from nabla_attn.bench import suite
    from nabla_attn.cli.bench import run

    points = [{"tokens": 256, "density": 0.2, "speed_up": 3.0}]
    monkeypatch.setattr(suite, "measure_crossover", lambda *_, **__: points)
    run(device="cpu", output=tmp_path / "results", crossover=True)
    assert machine.load_min_tokens(machine.crossover_file(CPU)) == 256
    assert (tmp_path / "results" / "bench_crossover.json").is_file()
