"""Schedules by path or by name, and runs that they were not calibrated for."""

from dataclasses import replace

import pytest
from typer.testing import CliRunner

from nabla_attn import Schedule, parse
from nabla_attn.calibrated_for import CalibratedFor, package_version
from nabla_attn.cli import app
from nabla_attn.files import read_json
from nabla_attn.generation.generate import generate
from nabla_attn.generation.pipeline import BUILTIN_DIRECTORY, load_pipeline
from nabla_attn.generation.request import GenerationRequest, ModelDefaults
from nabla_attn.generation.schedules import load_schedule, schedule_names
from nabla_attn.record import RunRecord

REQUEST = GenerationRequest(prompt="red", height=144, width=176, frames=5, steps=2)
MADE_FOR = CalibratedFor(
    model="WanTransformer3DModel", layers=2, heads=2, tokens=(2, 9, 11), steps=2
)


def test_what_is_no_schedule_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"schedule none: No such file.*`nabla calibrate`"):
        load_schedule("none")
    (tmp_path / "bad.json").write_text('{"algorithm": 1}')
    with pytest.raises(ValueError, match=r'bad\.json: .*"algorithm" string'):
        load_schedule(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"frames": 9}, "tokens 2x9x11, here 3x9x11"),
        ({"steps": 3}, "steps 2, here 3"),
    ],
)
def test_another_size_is_refused_before_anything_runs(tiny_wan, changes, difference):
    pipeline = load_pipeline(tiny_wan, device="cpu", dtype="float32")
    schedule = Schedule(algorithm=parse("nabla-0.5"), calibrated_for=MADE_FOR)
    run = replace(REQUEST, sparse_algo="nabla-0.5", schedule=schedule)
    generate(pipeline, run)
    with pytest.raises(ValueError, match=f"calibrated for {difference}.*--allow-mismatch"):
        generate(pipeline, replace(run, **changes))
    allowed = replace(schedule, allow_mismatch=True)
    with pytest.warns(UserWarning, match=difference):
        generate(pipeline, replace(run, schedule=allowed, **changes))


def test_the_built_in_models_schedule_is_for_it_and_within_its_density():
    assert schedule_names() == ["builtin-fast"]
    schedule = load_schedule("builtin-fast")
    defaults = ModelDefaults.load(BUILTIN_DIRECTORY)
    config = read_json(BUILTIN_DIRECTORY / "transformer" / "config.json")
    schedule.check_match(
        model=config["_class_name"],
        layers=config["num_layers"],
        heads=config["num_attention_heads"],
        tokens=((defaults.frames - 1) // 4 + 1, defaults.height // 8, defaults.width // 8),
        steps=defaults.steps,
        version=package_version(),
    )
    schedule.check_layers(config["num_layers"], num_heads=config["num_attention_heads"])
    assert len({str(algorithm) for algorithm in schedule.algorithms}) > 5


def test_a_shipped_schedule_is_followed_by_name(tmp_path):
    target = tmp_path / "a.mp4"
    options = ["--prompt=a red square", f"--output={target}", "--schedule=builtin-fast"]
    small = ["--frames=5", "--height=32", "--width=32", "--steps=2"]
    result = CliRunner().invoke(app, ["generate", *options, *small])
    assert result.exit_code == 2 and "tokens 9x32x32, here 2x4x4" in result.output
    result = CliRunner().invoke(app, ["generate", *options, *small, "--allow-mismatch"])
    assert result.exit_code == 0, result.output
    record = RunRecord.load(target.with_suffix(".json"))
    assert record.config["schedule"]["allow_mismatch"] is True
    assert (
        Schedule.from_dict(record.config["schedule"]).rules == load_schedule("builtin-fast").rules
    )
