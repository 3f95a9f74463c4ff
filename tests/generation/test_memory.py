import json
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

from nabla_attn.cli import app
from nabla_attn.cost import memory as cost
from nabla_attn.cost.memory import MemoryEstimate
from nabla_attn.generation import memory
from nabla_attn.generation.generate import generate
from nabla_attn.generation.memory import check_encoding, estimate_memory, part_bytes
from nabla_attn.generation.pipeline import BUILTIN_DIRECTORY, load_pipeline
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


def test_generate_refuses_before_any_work(tiny_wan, monkeypatch):
    pipeline = load_pipeline(tiny_wan, device="cpu", dtype="float32")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**20)
    monkeypatch.setattr(cost, "free_bytes", lambda device: 2**20)
    huge = GenerationRequest("red", height=64, width=64, frames=17, sparse_algo="nabla-0.5")
    with (
        mock.patch.object(type(pipeline), "__call__", side_effect=AssertionError),
        pytest.raises(ValueError, match=r"17 frames of 64x64 takes about .* MiB .* free on"),
    ):
        generate(pipeline, huge)


def test_an_unfolded_or_grouped_convolution_holds_more_than_its_tensors():
    def build():
        conv, x = torch.nn.Conv3d(8, 8, 3), torch.empty(1, 8, 4, 256, 256)
        return lambda: conv(x)

    output = 8 * 2 * 254 * 254 * 4
    # Measured: 106.4 MiB beside the output, 27 numbers of each of eight channels.
    assert cost.traced_peak(build, is_cpu=True) == output + 27 * output
    assert cost.traced_peak(build, is_cpu=False) == output


def test_encoding_is_refused_where_it_cannot_fit(tiny_wan, monkeypatch):
    pipeline = load_pipeline(tiny_wan, device="cpu", dtype="float32")
    check_encoding(pipeline, 17, 64, 64)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**20)
    monkeypatch.setattr(cost, "free_bytes", lambda device: 2**20)
    with pytest.raises(ValueError, match=r"encoding 17 frames of 64x64 takes about .* MiB"):
        check_encoding(pipeline, 17, 64, 64)
    with cost.force_memory():
        check_encoding(pipeline, 17, 64, 64)


def test_the_record_holds_estimates_within_a_quarter_of_what_was_measured():
    record = Path(__file__).parents[2] / "benchmarks" / "results" / "memory.json"
    cases = json.loads(record.read_text())["numbers"]["cases"]
    assert {case["work"] for case in cases} == {"generate", "train"}
    for case in cases:
        assert 0.75 < case["estimate"]["peak"] / case["measured"] < 1.25, case


def test_a_size_that_no_model_takes_is_refused_before_loading(tmp_path, monkeypatch):
    monkeypatch.setattr("nabla_attn.generation.pipeline.load_pipeline", None)
    command = ["generate", "--prompt", "red", "--height", "33", "--output", str(tmp_path / "a.mp4")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code
    assert "height 33 does not fit this model" in str(result.exception) + result.output


def test_without_psutil_only_the_limits_of_the_group_are_known(monkeypatch):
    monkeypatch.setitem(sys.modules, "psutil", None)
    monkeypatch.setattr(cost, "_group_limits", lambda: [2**63, 5000])
    assert cost.free_bytes(torch.device("cpu")) == 5000
