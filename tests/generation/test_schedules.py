"""Schedules by path or by name, and runs that they were not calibrated for."""

from dataclasses import replace

import pytest

from nabla_attn import Schedule, parse
from nabla_attn.calibrated_for import CalibratedFor
from nabla_attn.generation.generate import generate
from nabla_attn.generation.pipeline import load_pipeline
from nabla_attn.generation.request import GenerationRequest
from nabla_attn.generation.schedules import load_schedule, schedule_names

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


def test_names_are_those_of_the_package():
    for name in schedule_names():
        assert load_schedule(name).calibrated_for is not None
