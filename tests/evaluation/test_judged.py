"""Judged videos of methods: settings of the leaderboard in, one compact record out."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from nabla_attn.cli import app
from nabla_attn.evaluation.judged import KEPT, judge_methods, read_algorithms
from nabla_attn.generation.pipeline import load_pipeline
from nabla_attn.generation.request import GenerationRequest
from nabla_attn.moving_shapes.judge import MovingShapesScorer
from nabla_attn.record import RunRecord

SETTINGS = {
    "topk": [
        {"method": "topk", "wanted": 0.1, "algorithm": "topk-0.1", "density": 0.1},
        {"method": "topk", "wanted": 0.2, "algorithm": "topk-0.1", "density": 0.1},
        {"method": "topk", "wanted": 0.3, "algorithm": "topk-0.3", "density": 0.3},
    ],
    "iwin": [{"method": "iwin", "wanted": 0.1, "algorithm": "iwin-1-8-8", "density": 0.1}],
}


@pytest.fixture
def settings(tmp_path):
    path = tmp_path / "methods" / "settings.json"
    RunRecord("leaderboard", {}, 0, {}, "cpu", {"settings": SETTINGS}).save(path)
    return path


def test_algorithms_are_those_that_the_leaderboard_set(settings):
    found = read_algorithms(settings, ["topk"], [0.1, 0.2])
    assert found == {"topk": ["topk-0.1"]}
    assert read_algorithms(settings, ["topk"], [0.1, 0.3]) == {"topk": ["topk-0.1", "topk-0.3"]}


def test_what_is_missing_is_said_with_the_command(settings):
    with pytest.raises(ValueError, match=r"lacks iwin at some of .* --method iwin"):
        read_algorithms(settings, ["topk", "iwin"], [0.1, 0.3])
    with pytest.raises(ValueError, match="vdit needs a table"):
        read_algorithms(settings, ["vdit"], [0.1])
    with pytest.raises(ValueError, match="run `nabla bench methods` first"):
        read_algorithms(settings.parent / "none.json", ["topk"], [0.1])
    result = CliRunner().invoke(app, ["bench", "judged", "--output", str(settings.parent)])
    assert result.exit_code == 2 and "run `nabla bench methods` first" in result.output
    result = CliRunner().invoke(app, ["bench", "methods", "--data", "real"])
    assert result.exit_code == 2 and "--data is model or synthetic" in result.output


def test_every_video_is_kept_in_few_numbers_and_a_run_goes_on(tiny_wan, tmp_path):
    pipeline = load_pipeline(tiny_wan, device="cpu", dtype="float32")
    request = GenerationRequest(prompt="", height=144, width=176, frames=5, steps=2)
    prompts = MovingShapesScorer().prompts(2)
    where = {"videos": tmp_path / "videos", "record": tmp_path / "judged.json", "fps": 8.0}
    made = []

    def run(algorithms, prompts):
        return judge_methods(
            pipeline,
            request,
            algorithms,
            prompts,
            MovingShapesScorer(),
            **where,
            on_video=lambda label, done, total: made.append(label) or (lambda *stage: None),
        )

    first = run(["topk-0.3"], prompts[:1])
    assert made == ["dense p0000-s0", "topk-0.3 p0000-s0"]
    assert list(first.numbers["algorithms"]) == ["dense", "topk-0.3"]
    values = first.numbers["algorithms"]["topk-0.3"][prompts[0]]
    assert set(values) == set(KEPT) and values["psnr"] > 0 and 0 < values["density"] < 1
    assert first.numbers["algorithms"]["dense"][prompts[0]]["psnr"] == 0
    assert "prompt" not in first.config and first.config["model_files"]
    run(["topk-0.3"], prompts[:1])
    assert len(made) == 2
    # Generation alone would begin a window with twelve dense steps.
    both = run(["sta-1-1-1", "topk-0.3"], prompts[:1]).numbers["algorithms"]
    assert both["sta-1-1-1"][prompts[0]]["density"] < 1
    assert json.loads((tmp_path / "judged.json").read_text())["kind"] == "judged"
    with pytest.raises(ValueError, match="made with other settings"):
        judge_methods(
            pipeline,
            replace(request, steps=3),
            ["topk-0.3"],
            prompts[:1],
            MovingShapesScorer(),
            **where,
        )
