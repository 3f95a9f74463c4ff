"""The search for FlexAttention's options, and its variants: run on a CPU by other backends."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import nabla_attn as na
from nabla_attn.backends import flex_options, gather
from nabla_attn.backends.flex_options import FlexOptions, choose_options
from nabla_attn.bench import attention, report, suite, tune
from nabla_attn.bench.workloads import WORKLOADS, workload
from nabla_attn.record import RunRecord

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = replace(
    workload("toy-cpu"), grid=na.TokenGrid(3, 16, 24), heads=2, dim=32, dtype=torch.float32
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NABLA_ATTN_CACHE", str(tmp_path / "cache"))
    flex_options.forget_tables()
    yield
    flex_options.forget_tables()


@pytest.fixture
def no_flex(monkeypatch):
    """Compiling takes too long here."""
    monkeypatch.setattr("nabla_attn.backends.flex.why_not_compile", lambda device: "not in tests")


def slower_in_one_row_tiles(*blocks):
    # The block map is last; the default options are slow here, and tiles of two rows fast.
    options = flex_options._override.get()
    if options.tile_rows == 1:
        time.sleep(0.1)
    return gather.attend(*blocks)


def test_the_fastest_right_candidate_is_found_and_used(monkeypatch, tmp_path):
    monkeypatch.setattr(tune.flex, "attend", slower_in_one_row_tiles)
    monkeypatch.setitem(WORKLOADS, "small", replace(SMALL, name="small"))
    tune.main(["small", "--device", "cpu", "--rounds", "1", "--output", str(tmp_path)])
    record = RunRecord.load(tmp_path / "tune_small_cpu.json")
    result = record.numbers["results"][0]
    assert result["best"] == {"tile_rows": 2, "kernel_options": {}}
    assert all(entry["seconds"]["median"] > 0 for entry in result["tried"])
    row = json.loads(flex_options.tuned_file(CPU).read_text())["rows"][0]
    assert row["record"] == "tune_small_cpu.json" and row["head_dim"] == 32
    q = torch.zeros(1, 1, 1, 32)
    assert choose_options(q, 64, needs_backward=False) == FlexOptions(2)
    assert choose_options(q.bfloat16(), 64, needs_backward=False) == FlexOptions()


def test_a_workload_replaces_its_own_row_alone(monkeypatch, tmp_path):
    path = flex_options.tuned_file(CPU)

    def tune_one(name, head_dim, tile_rows):
        key = flex_options.key_of(torch.zeros(1, 1, 1, head_dim), 64, needs_backward=False)
        best = {"tile_rows": tile_rows, "kernel_options": {}}
        result = {"workload": name, "key": key, "best": best}
        monkeypatch.setattr(tune, "tune", lambda *_, **__: result)
        monkeypatch.setitem(WORKLOADS, name, replace(SMALL, name=name))
        tune.main([name, "--device", "cpu", "--output", str(tmp_path)])

    def chosen(head_dim):
        q = torch.zeros(1, 1, 1, head_dim)
        return choose_options(q, 64, needs_backward=False).tile_rows

    tune_one("narrow", 32, 2)
    tune_one("wide", 64, 3)
    assert (chosen(32), chosen(64)) == (2, 3)
    tune_one("narrow", 32, 4)
    assert (chosen(32), chosen(64)) == (4, 3)
    tune_one("also narrow", 32, 5)
    assert (chosen(32), chosen(64)) == (5, 3)
    rows = flex_options.table_rows(path)
    assert [row["workload"] for row in rows] == ["also narrow", "narrow", "wide"]
    assert all((tmp_path / row["record"]).is_file() for row in rows)


def test_a_table_that_cannot_be_read_is_refused_before_the_search(monkeypatch, tmp_path, capsys):
    path = flex_options.tuned_file(CPU)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    monkeypatch.setattr(tune, "tune", lambda *_, **__: pytest.fail("it searched"))
    with pytest.raises(SystemExit):
        tune.main(["toy-cpu", "--device", "cpu", "--output", str(tmp_path)])
    assert "is no table of flex options" in capsys.readouterr().err


def test_wrong_failing_and_late_candidates_are_not_chosen(monkeypatch):
    def attend(*blocks):
        if flex_options._override.get().tile_rows == 1:
            raise RuntimeError("out of resource: shared memory\nmore")
        return 1.01 * gather.attend(*blocks)

    monkeypatch.setattr(tune.flex, "attend", attend)
    with pytest.raises(ValueError, match="no candidate ran, the first because out of resource"):
        tune.tune(SMALL, CPU, rounds=1)
    monkeypatch.setattr(tune.flex, "attend", gather.attend)
    with pytest.raises(ValueError, match="because no time was left"):
        tune.tune(SMALL, CPU, rounds=1, deadline=time.monotonic() - 1)


def test_gpu_candidates_fit_the_blocks():
    found = list(tune.candidates(CUDA, 64, 128))
    assert found[0] == FlexOptions() and FlexOptions(2) in found
    # Two rows of blocks in four warps would spill 1.7 KB a thread.
    assert len(found) == 11
    assert not [c for c in found if c.tile_rows == 2 and c.kernel.get("fwd_num_warps") == 4]
    assert len(list(tune.candidates(CUDA, 64, 64))) == 14


def test_gpu_candidates_fit_the_device(monkeypatch):
    def on(capability, memory):
        properties = SimpleNamespace(shared_memory_per_block_optin=memory)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        return [c.kernel for c in tune.candidates(CUDA, 64, 128) if c.tile_rows == 2]

    hopper, ada = on((9, 0), 232_448), on((8, 9), 101_376)
    assert {"fwd_USE_TMA": True} in hopper
    assert [kernel["fwd_num_stages"] for kernel in hopper if "fwd_num_stages" in kernel] == [
        2,
        3,
        4,
    ]
    # What does not fit would run in one stage, under the name of another.
    assert [kernel["fwd_num_stages"] for kernel in ada if kernel] == [2]


def test_dry_run_needs_only_torch():
    absent = ["jaxtyping", "diffusers", "transformers", "typer", "rich", "scipy", "matplotlib"]
    code = (
        f"import sys, runpy; sys.modules.update(dict.fromkeys({absent}));"
        "sys.argv = ['tune', '--device', 'cpu', '--dry-run'];"
        "runpy.run_module('nabla_attn.bench.tune', run_name='__main__')"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "wan14b-720p: FlexOptions(tile_rows=2" in process.stdout


def test_a_contender_that_fails_ends_nothing(no_flex, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("CUDA error: out of memory\nmore")

    monkeypatch.setattr("nabla_attn.bench.contenders.nabla_attention", fail)
    result = attention.measure_attention(SMALL, 0.4, CPU, rounds=1)
    assert result["contenders"]["ours (gather)"] == {
        "why_not": "it failed: CUDA error: out of memory"
    }
    assert result["contenders"]["dense (flash)"]["seconds"]["median"] > 0


def test_a_budget_leaves_measurements_out_and_says_which(no_flex, monkeypatch, tmp_path):
    monkeypatch.setitem(WORKLOADS, "toy-cpu", replace(SMALL, densities=(0.4,)))
    path = suite.run_suite(("toy-cpu",), CPU, tmp_path, rounds=1, budget=-1.0)[0]
    page = report.section(RunRecord.load(path))
    assert "Left out because there was no time: toy-cpu float32 density 0.4 forward," in page
