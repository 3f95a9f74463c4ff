"""`--json` of the verbs that print results, lines of progress in log files, completion."""

import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from nabla_attn import fusion
from nabla_attn.cli import app, progress

SIZE = ["--height", "32", "--width", "32", "--frames", "53", "--steps", "1", "--device", "cpu"]


def nabla(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_info(monkeypatch):
    broken = "g++ cannot build: Python.h: No such file"
    monkeypatch.setattr(fusion, "why_not_compile", lambda device: broken)
    values = json.loads(nabla("info", "--device", "cpu", "--json").stdout)
    assert values.keys() == {
        "versions", "device", "device_name", "cpu_features", "dtype", "compiler", "backends",
        "backend_auto", "algorithms", "models", "builtin_model",
    }  # fmt: skip
    assert values["versions"]["torch"] == torch.__version__
    assert values["compiler"] == broken
    assert values["backends"]["gather"] is None
    assert "WanTransformer3DModel" in values["models"]
    text = " ".join(nabla("info", "--device", "cpu").stdout.split())
    assert f"compiler does not work: {broken}" in text
    assert "algorithms NAME-VALUE-VALUE of a method such as nabla-0.7" in text
    monkeypatch.setattr(fusion, "why_not_compile", lambda device: None)
    assert "compiler works" in " ".join(nabla("info", "--device", "cpu").stdout.split())


def test_info_on_memory():
    values = json.loads(nabla("info", "--memory", "t2v-14B", "1280*720", "--json").stdout)
    needs = values["memory"]
    assert values.keys() == {"memory"} and needs["task"] == "t2v-14B"
    assert (needs["width"], needs["height"], needs["frames"]) == (1280, 720, 81)
    assert all(isinstance(amount, int) for amount in needs["bytes"].values())
    assert needs["bytes"]["peak"] > needs["bytes"]["peak_offload_tiled"] > 2**30
    assert needs["smallest_card_gb"] in (48, 80)


def test_warmup(tiny_wan):
    algorithms = ("--sparse-algo", "nabla-0.4", "--sparse-algo", "sta-1-1-1")
    result = nabla("warmup", "--model", tiny_wan, *SIZE, *algorithms, "--json")
    values = json.loads(result.stdout)
    assert values.keys() == {"algorithms", "cache"}
    first = values["algorithms"][0]
    assert first.keys() == {
        "sparse_algo", "frames", "height", "width", "seconds", "graphs", "from_cache",
    }  # fmt: skip
    assert (first["sparse_algo"], first["frames"], first["height"]) == ("nabla-0.4", 53, 32)


def test_calibrate(tiny_wan, tmp_path):
    asked = ["calibrate", "--model", tiny_wan, *SIZE, "--num-prompts", 1, "--density", 0.5]
    asked += ["--sparse-algo", "topk-0.2", "--sparse-algo", "topk-0.4", "--output", tmp_path]
    values = json.loads(nabla(*asked, "--json").stdout)
    assert values.keys() == {"schedule", "density", "error", "layers", "one_for_all", "rules"}
    assert values["schedule"] == str(tmp_path / "schedule.json")
    assert 0 < values["density"] <= 0.5
    assert values["one_for_all"]["dense"]["density"] == 1
    assert set(values["layers"]) <= values["one_for_all"].keys()


@pytest.mark.parametrize("is_quiet", [False, True])
def test_generations_write_lines_to_log_files(capsys, monkeypatch, is_quiet):
    monkeypatch.setattr(progress.Settings, "is_quiet", is_quiet)
    times = iter([0, 10, 20, 35, 50, 80, 90])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(times))
    with progress.generation_bars(every_seconds=30) as start:
        show = start("nabla-0.7")
        show("text", 0, 1)
        show("denoise", 0, 10)
        show("denoise", 1, 10)
        show("denoise", 2, 10)
        show("decode", 0, 1)
        show("done", 1, 1)
    lines = ["nabla-0.7: 1/10 15.0 s/step 135 s left", "nabla-0.7: decoding"]
    assert capsys.readouterr().err.splitlines() == ([] if is_quiet else lines)


def test_quiet_silences_the_lines_of_labels_too(capsys, monkeypatch):
    for is_quiet in (False, True):
        monkeypatch.setattr(progress.Settings, "is_quiet", is_quiet)
        with progress.generation_bars(in_logs=True) as start:
            start("1/2 dense")
        assert capsys.readouterr().err == ("" if is_quiet else "1/2 dense\n")


def test_the_shell_completes_verbs_and_options():
    for words, completed in (("nabla ge", "generate"), ("nabla view --over", "--overwrite")):
        request = {
            "_NABLA_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")),
        }
        code = "from nabla_attn.cli import app; app(prog_name='nabla')"
        result = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | request, capture_output=True, text=True
        )
        assert result.stdout.split() == [completed], result.stderr
