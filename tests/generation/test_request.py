import json

import pytest

from nabla_attn.config import parse
from nabla_attn.generation.generate import generate
from nabla_attn.generation.pipeline import load_pipeline
from nabla_attn.generation.request import (
    GenerationRequest,
    ModelDefaults,
    check_request,
    video_tokens,
)
from nabla_attn.schedule import Schedule

GOOD = {"prompt": "a red circle", "height": 64, "width": 96, "frames": 9, "steps": 2}


@pytest.fixture(scope="module")
def pipeline(tiny_wan):
    return load_pipeline(tiny_wan, device="cpu", dtype="float32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": -3}, "steps must be at least 1, got -3"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"frames": 0}, "frames must be at least 1"),
        ({"height": -16}, "height must be at least 1"),
        ({"seed": -1}, "seed must be"),
        ({"guidance": float("nan")}, "guidance must be"),
        ({"guidance": -2.0}, "guidance must be"),
        ({"sparse_algo": "nabla-1.7"}, "nabla-1.7"),
        ({"sparse_algo": "magic"}, "magic"),
        ({"steps": 2.5}, "steps must be a valid integer, got 2.5"),
        ({"prompt": "a red circle \ud83d"}, r"the prompt has half a character, '\\ud83d', at pos"),
        ({"negative_prompt": "caf\udce9"}, "the negative prompt has half a character"),
    ],
)
def test_impossible_values(change, message):
    with pytest.raises(ValueError, match=message):
        GenerationRequest(**(GOOD | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 100}, r"height 100 .* multiples of 16\. Nearest: 96 or 112\."),
        ({"width": 9}, r"width 9 .* Nearest: 16\."),
        ({"frames": 18}, r"frames 18 .* 4n\+1\. Nearest: 17 or 21\."),
        ({"frames": 4}, r"Nearest: 1 or 5\."),
        ({"height": 16 * 65}, "positions end at 64 tokens"),
    ],
)
def test_sizes_the_model_cannot_take(pipeline, change, message):
    with pytest.raises(ValueError, match=message):
        check_request(pipeline, GenerationRequest(**(GOOD | change)))


@pytest.mark.parametrize(("frames", "grid"), [(1, (1, 4, 6)), (9, (3, 4, 6))])
def test_good_sizes_pass_in_silence(pipeline, recwarn, frames, grid):
    request = GenerationRequest(**(GOOD | {"frames": frames}))
    check_request(pipeline, request)
    assert video_tokens(pipeline, request) == grid
    assert not recwarn.list


DENSE = parse("dense")


def rules_of(pipeline, algorithm, **rules):
    """Generate with these rules."""
    schedule = Schedule(algorithm=parse(algorithm), **rules) if rules else None
    generate(pipeline, GenerationRequest(**GOOD, sparse_algo=algorithm, schedule=schedule))


@pytest.mark.parametrize(
    ("algorithm", "rules", "words"),
    [
        ("sta-3-3-3", {}, "changes nothing here: its schedule keeps 12 steps"),
        ("nabla-0.7", {"min_tokens": 73}, "below 73 tokens dense, and this has 72"),
        ("nabla-0.7", {"dense_first_steps": 1, "dense_last_steps": 1}, "2 steps dense, and there"),
        ("nabla-0.7", {"dense_layers": (0, -1)}, "every step and layer dense"),
        (
            "nabla-0.7",
            {"layer_overrides": {0: DENSE}, "dense_layers": (1,)},
            "step and layer dense",
        ),
        ("nabla-0.7", {"step_overrides": {0: DENSE, 1: DENSE}}, "every step and layer dense"),
        ("nabla-0.7", {"step_overrides": {2: DENSE, 9: DENSE}}, "steps 2, 9 are unused: .* 0 to 1"),
    ],
)
def test_rules_that_change_nothing_are_told_of(pipeline, algorithm, rules, words):
    with pytest.warns(UserWarning, match=words) as told:
        rules_of(pipeline, algorithm, **rules)
    assert len([each for each in told if "schedule" in str(each.message)]) == 1


def test_rules_that_leave_something_sparse_pass_in_silence(pipeline, recwarn):
    rules_of(pipeline, "nabla-0.7", min_tokens=72, dense_layers=(0,), step_overrides={0: DENSE})
    assert not [each for each in recwarn if "schedule" in str(each.message)]


def test_with_algo_keeps_the_schedule_and_dense_drops_it():
    rules = Schedule(algorithm=parse("nabla-0.7"), dense_first_steps=1)
    request = GenerationRequest(**GOOD, sparse_algo="nabla-0.7", schedule=rules)
    other = request.with_algo("nabla-0.4")
    assert other.schedule.dense_first_steps == 1
    assert other.schedule.algorithm == parse("nabla-0.4")
    assert request.with_algo("dense").schedule is None
    assert request.with_algo("dense").is_dense
    assert json.loads(json.dumps(request.to_dict()))["schedule"]["algorithm"] == "nabla-0.7"
    with pytest.raises(ValueError, match="Pass the same"):
        GenerationRequest(**GOOD, sparse_algo="nabla-0.4", schedule=rules)


def test_model_defaults(tmp_path):
    assert ModelDefaults.load(tmp_path) == ModelDefaults()
    path = tmp_path / "defaults.json"
    path.write_text(json.dumps({"height": 256, "fps": 8, "sparse_algo": "nabla-0.7"}))
    assert ModelDefaults.load(tmp_path) == ModelDefaults(height=256, fps=8, sparse_algo="nabla-0.7")


def test_model_defaults_with_a_schedule(tmp_path):
    schedule = Schedule(algorithm=parse("nabla-0.7"), layer_overrides={0: parse("nabla-0.9")})
    rules = json.loads(schedule.to_json())
    path = tmp_path / "defaults.json"
    path.write_text(json.dumps({"sparse_algo": "nabla-0.7", "schedule": rules}))
    defaults = ModelDefaults.load(tmp_path)
    assert defaults == ModelDefaults(sparse_algo="nabla-0.7", schedule=schedule)
    path.write_text(json.dumps({"schedule": None}))
    assert ModelDefaults.load(tmp_path) == ModelDefaults()
    for values in ({"sparse_algo": "nabla-0.6", "schedule": rules}, {"schedule": [1]}):
        path.write_text(json.dumps(values))
        with pytest.raises(ValueError, match=r"defaults\.json: .*schedule"):
            ModelDefaults.load(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"height": "x"}', '{"height": true}', '{"depth": 3}', '{"fps": "8"}']
)
def test_broken_defaults_are_named(tmp_path, text):
    (tmp_path / "defaults.json").write_text(text)
    with pytest.raises(ValueError, match=r"defaults\.json"):
        ModelDefaults.load(tmp_path)


def test_a_guider_that_guides_by_no_number_is_named(tmp_path):
    (tmp_path / "guider").mkdir()
    (tmp_path / "guider" / "guider_config.json").write_text('{"guidance_scale": NaN}')
    with pytest.raises(ValueError, match=r"guider_config\.json: .*guidance_scale: NaN is not"):
        ModelDefaults.load(tmp_path)
