import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from nabla_attn.cli import app
from nabla_attn.cost import memory as cost
from nabla_attn.cost.memory import MemoryEstimate
from nabla_attn.generation.memory import estimate_memory, part_bytes
from nabla_attn.generation.pipeline import BUILTIN_DIRECTORY
from nabla_attn.generation.placement import Placement
from nabla_attn.generation.request import GenerationRequest

CPU = torch.device("cpu")
SMALL = GenerationRequest("red", height=64, width=64, frames=5, steps=1, sparse_algo="nabla-0.5")


def estimate(directory, request=SMALL, dtype=torch.float32, **placement):
    placed = Placement(**placement)
    return estimate_memory(directory, request, device=CPU, dtype=dtype, placement=placed)


def test_the_peak_is_the_largest_stage_and_no_sum():
    found = MemoryEstimate(weights=100, stages={"denoising": 30, "decoding": 50})
    assert (found.largest, found.peak) == ("decoding", 150)
    assert found.to_dict()["peak"] == 150


def test_weights_are_those_of_the_files_in_the_dtype_asked_for():
    full, half = (part_bytes(BUILTIN_DIRECTORY, kind) for kind in (torch.float32, torch.bfloat16))
    from safetensors.torch import load_file

    file = next((BUILTIN_DIRECTORY / "transformer").glob("*.safetensors"))
    assert full["transformer"] == 4 * sum(x.numel() for x in load_file(file).values())
    assert half["transformer"] == full["transformer"] // 2
    assert half["vae"] == full["vae"]  # it stays in float32


def test_larger_videos_take_more_in_every_stage(tiny_wan):
    large = estimate(tiny_wan, GenerationRequest("red", height=512, width=512, frames=17))
    small = estimate(tiny_wan)
    assert all(large.stages[name] > small.stages[name] for name in ("denoising", "decoding"))
    assert large.weights == small.weights


def test_a_model_is_not_loaded_to_be_estimated(tiny_wan, monkeypatch):
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr("safetensors.torch.load_file", None)
    assert estimate(tiny_wan).weights > 0


REFUSED = ["--height", "4096", "--width", "4096", "--frames", "401"]


@pytest.mark.parametrize("verb", ["generate", "compare"])
def test_what_cannot_fit_is_refused_in_one_line_before_loading(verb, tmp_path, monkeypatch):
    monkeypatch.setattr("nabla_attn.generation.pipeline.load_pipeline", None)
    command = [verb, "--prompt", "red", *REFUSED, "--output", str(tmp_path / "video.mp4")]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, ValueError | SystemExit) and result.exit_code
    text = str(result.exception) + result.output
    for part in ("401 frames of 4096x4096", "GiB", "free on the cpu", "--force", "fewer frames"):
        assert part in text


def test_a_small_machine_refuses_and_force_tries(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "free_bytes", lambda device: 1000)
    small = ["--height", "16", "--width", "16", "--frames", "1", "--steps", "2", "--guidance", "1"]
    command = ["generate", "--prompt", "red", *small, "--json"]
    refused = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "a.mp4")])
    assert refused.exit_code and not (tmp_path / "a.mp4").exists()
    forced = CliRunner().invoke(app, [*command, "--force", "--output", str(tmp_path / "b.mp4")])
    assert forced.exit_code == 0, forced.output
    assert (tmp_path / "b.mp4").exists()
    assert json.loads(forced.stdout)["memory"]["peak"] > 1000
    assert forced.stderr.count("note: memory: about") == 1


def test_the_limit_of_a_control_group_counts(tmp_path: Path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("300\n")
    assert min(cost._group_limits(tmp_path)) == 700
    (tmp_path / "memory.max").write_text("max\n")
    assert min(cost._group_limits(tmp_path)) == 2**63
