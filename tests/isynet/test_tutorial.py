"""The commands of docs/isynet.md, one after the other, at the smallest size."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from isynet.cli import IsynetGroup, app

PAGE = Path(__file__).parents[2] / "docs" / "isynet.md"
SHAPES = "--data shapes --size 16 --steps 2 --batch 4"
SMALLER = {
    "measure": "isynet-n0 squeezenet --size 64 --batch 1 --runtime torch",
    "mem": "--size 64",
    "search": f"{SHAPES} --runtime torch --stages 3 --heads 0 --least 0 --population 2 "
    "--generations 1 --rungs 1 --validation 32",
    "train": SHAPES,
    "scale": f"{SHAPES} --runtime torch --seeds 1 --added 1 --validation 32",
    "bench": f"{SHAPES} --runtime torch --seeds 1",
    "detect": "--data shapes --size 32 --steps 2 --batch 2 --test-images 4",
    "export": "--size 16",
}


def commands():
    tutorial = PAGE.read_text().split("## Tutorial")[1].split("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", tutorial, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def test_the_tutorial_runs(tmp_path, monkeypatch):
    for name in ("onnxruntime", "pycocotools"):
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NABLA_ATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("isynet.comparison.WIDTHS", (8,))
    seen = set()
    for program, verb, *args in commands():
        assert program == "isynet"
        seen.add(verb)
        # Whatever the machine, every network of this size is within the latency.
        args = [
            "1000" if last == "--latency-ms" else arg
            for last, arg in zip([verb, *args], args, strict=False)
        ]
        result = CliRunner().invoke(app, [verb, *args, *shlex.split(SMALLER[verb])])
        assert result.exit_code == 0, (verb, result.output)
    assert seen == set(SMALLER)
    from onnxruntime import InferenceSession

    assert InferenceSession("out/network.onnx").get_inputs()[0].shape[1:] == [3, 16, 16]


def test_every_verb_is_in_the_page():
    text = PAGE.read_text()
    assert all(f"isynet {verb}" in text for verb in IsynetGroup.verbs)
