"""The commands for a GPU machine: refused without one, and run whole at tiny size on a CPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, suite
from nabla_attn.backends import flex
from nabla_attn.bench import scaling, tune
from nabla_attn.core.grid import TokenGrid
from nabla_attn.record import RunRecord

ROOT = Path(__file__).parents[2]
REFUSAL = "no CUDA device is here"


def run(command, folder, capsys, *more):
    gpu.main([command, "--dry-run", "--output", str(folder), *more])
    lines = capsys.readouterr().out.splitlines()
    paths = [line.removeprefix("record: ") for line in lines if line.startswith("record: ")]
    return [RunRecord.load(path) for path in paths]


@pytest.mark.parametrize("command", gpu.COMMANDS)
def test_without_a_gpu_each_says_so_in_a_line(command, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([command])
    assert REFUSAL in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.main([command, "--device", "cpu"])
    assert "Pass --dry-run" in capsys.readouterr().err


def test_the_searches_and_benchmarks_say_so_too(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        tune.main(["--device", "cuda"])
    assert REFUSAL in capsys.readouterr().err
    tune.main(["--device", "cuda", "--dry-run", "wan14b-720p"])
    assert "wan14b-720p: FlexOptions" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["suite", "--device", "cuda", "--dry-run"])
    suite.main()
    listed = capsys.readouterr().out
    for workload in ("paper-768p", "wan14b-720p", "wan1.3b-480p", "kandinsky5-10s"):
        assert f"| {workload} | ours (flex, tiles of 128) |" in listed
    assert "| ours (fastvideo) |" in listed
    if not torch.cuda.is_available():
        command = [sys.executable, "-m", "benchmarks.suite", "--device", "cuda"]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert process.returncode and REFUSAL in process.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not here")
@pytest.mark.parametrize(
    ("target", "command"),
    {
        "check-gpu": "-m benchmarks.gpu correctness",
        "bench-gpu": "-m benchmarks.suite --device cuda --budget 400",
        "tune-gpu": "-m nabla_attn.bench.tune --device cuda --budget 400",
        "layer-gpu": "-m benchmarks.gpu layer",
        "model-gpu": "-m benchmarks.gpu model",
    }.items(),
)
def test_make_knows_the_five(target, command):
    # Where `make` runs the tests, this one would speak of its folder and follow its flags.
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "PYTHON"))
    }
    command_line = ["make", "--no-print-directory", "-n", target]
    lines = subprocess.run(command_line, cwd=ROOT, env=env, capture_output=True, text=True)
    assert lines.stdout.strip() == f"PYTHONPATH=src python3 {command}"


def test_correctness_holds_outputs_and_gradients(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(flex, "why_not_compile", lambda device: "not in tests")
    (record,) = run("correctness", tmp_path, capsys)
    rows = {row["case"]: row for row in record.numbers["results"]}
    ran = [row for row in rows.values() if row["passed"] is not None]
    # gather, in three data types, forward and with its backward.
    assert len(ran) == 6 and all(row["passed"] for row in ran)
    assert {"out", "dq", "dk", "dv"} <= rows["gather 1x9x12 64 float32 forward+backward"].keys()
    assert "not in tests" in rows["flex 1x9x12 64 bfloat16 forward"]["why_not"]


def test_correctness_finds_what_is_wrong(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(flex, "why_not_compile", lambda device: "not in tests")
    right = gpu.nabla_attention
    monkeypatch.setattr(gpu, "nabla_attention", lambda *x, **options: 1.1 * right(*x, **options))
    (record,) = run("correctness", tmp_path, capsys)
    ran = [row["passed"] for row in record.numbers["results"] if row["passed"] is not None]
    assert ran == [False] * 6


def test_no_case_starts_without_time(tmp_path, capsys):
    (record,) = run("correctness", tmp_path, capsys, "--budget", "0")
    assert record.numbers["results"] == [] and len(record.config["left_out"]) == 24


def test_a_layer_is_timed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scaling, "CPU_SHAPE", (1, 1, 64, TokenGrid(1, 8, 16)))
    (record,) = run("layer", tmp_path, capsys)
    assert record.kind == "bench-model" and record.config["layers"] == 1
    assert [row["density"] for row in record.numbers["results"]] == [0.1, 0.2]


def test_the_built_in_model_is_compared(tmp_path, capsys):
    records = run("model", tmp_path, capsys)
    assert [each.config["sparse_algo"] for each in records] == ["dense", *gpu.ALGORITHMS]
