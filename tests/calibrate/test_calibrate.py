import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from nabla_attn import Schedule, parse
from nabla_attn.calibrate import run as run_module
from nabla_attn.calibrate.candidates import (
    SHARES,
    THRESHOLDS,
    CandidateLosses,
    choose_within,
    one_for_all,
    read_candidates,
)
from nabla_attn.calibrate.run import Calibration
from nabla_attn.cli import app
from nabla_attn.evaluation.probe import AttentionProbe
from nabla_attn.generation.generate import generate
from nabla_attn.generation.pipeline import load_pipeline
from nabla_attn.generation.request import GenerationRequest

REQUEST = GenerationRequest(prompt="red", height=144, width=176, frames=5, steps=2)
CANDIDATES = read_candidates(["nabla-0.3", "nabla-0.6", "sta-1-1-1"])
SIZE = ["--height=144", "--width=176", "--frames=5", "--steps=2", "--dtype=float32"]


@pytest.fixture(scope="module")
def pipeline(tiny_wan):
    return load_pipeline(tiny_wan, device="cpu", dtype="float32")


def test_a_star_stands_for_a_range_of_numbers():
    found = [str(config) for config in read_candidates(["nabla-*", "topk-*", "topk-0.1", "dense"])]
    assert len(found) == len(set(found)) == len(THRESHOLDS) + len(SHARES) + 1
    assert "nabla-0.9" in found
    assert found[-1] == "dense"
    assert str(read_candidates(["nabla-*_sta-3-3-3"])[0]) == "nabla-0.1_sta-3-3-3"


@pytest.mark.parametrize("texts", [[], ["dense"], ["nabla-x"], ["nabla-*-*"], ["sta-*-3-3"]])
def test_what_is_no_algorithm_is_refused(texts):
    with pytest.raises(ValueError):
        read_candidates(texts)


@given(
    layers=st.integers(1, 4),
    seed=st.integers(0, 1000),
    budget=st.floats(0, 1),
    by=st.sampled_from(["density", "error"]),
)
def test_the_choice_is_the_best_of_all_within_the_budget(layers, seed, budget, by):
    rng = np.random.default_rng(seed)
    losses = CandidateLosses(rng.random((layers, 3)), rng.random((layers, 3)))
    candidates = [parse(text) for text in ("nabla-0.2", "nabla-0.5", "dense")]
    spent, cost = losses.density, losses.error
    if by == "error":
        spent, cost = cost, spent
    rows = np.arange(layers)
    fitting = [
        cost[rows, list(picked)].mean()
        for picked in itertools.product(range(3), repeat=layers)
        if spent[rows, list(picked)].mean() <= budget
    ]
    if not fitting:
        with pytest.raises(ValueError, match="not possible"):
            choose_within(losses, candidates, **{by: budget})
        return
    choice = choose_within(losses, candidates, **{by: budget})
    reached = {"density": choice.density, "error": choice.error}
    assert reached.pop(by) <= budget + 1e-6
    assert reached.popitem()[1] == pytest.approx(min(fitting), abs=1e-6)


def test_losses_are_those_of_a_probe_where_the_maps_are_the_same(pipeline, tmp_path):
    # With everything kept so far, the first layer of the first step sees the same tokens.
    run = replace(REQUEST, steps=1)
    losses = Calibration(pipeline, run, CANDIDATES, tmp_path).measure(["red"])
    for number, config in enumerate(CANDIDATES[:-1]):
        probe = AttentionProbe(num_steps=1)
        schedule = Schedule(algorithm=config)
        generate(
            pipeline,
            replace(run, sparse_algo=str(config), schedule=schedule),
            on_apply=probe.attach,
        )
        expected = probe.result().values
        assert losses.density[0, number] == pytest.approx(
            expected["density"][0, 0].mean().item(), abs=1e-5
        )
        error = expected["output_error"][0, 0].mean().item()
        assert losses.error[0, number] == pytest.approx(error, abs=1e-5)
    assert (losses.density[:, -1] == 1).all()
    assert (losses.error[:, -1] == 0).all()


def test_a_schedule_runs_as_predicted(pipeline, tmp_path):
    calibration = Calibration(pipeline, replace(REQUEST, steps=1), CANDIDATES, tmp_path)
    losses = calibration.measure(["red"])
    singles = one_for_all(losses, CANDIDATES)
    budget = (singles[0].density + singles[1].density) / 2
    choice = choose_within(losses, CANDIDATES, density=budget)
    schedule = calibration.schedule(choice)
    assert Schedule.from_json(schedule.to_json()) == schedule
    for layer, config in enumerate(choice.layers):
        assert schedule.config_for(0, layer) == config
    run = replace(calibration.request, sparse_algo=str(schedule.algorithm), schedule=schedule)
    _, record = generate(pipeline, run)
    assert record.numbers["attention"]["density"] == pytest.approx(choice.density, rel=0.05)


def test_dense_steps_stay_dense_and_count(pipeline, tmp_path):
    rules = Schedule(algorithm=parse("dense"), dense_first_steps=1)
    request = replace(REQUEST, sparse_algo="dense", schedule=rules)
    calibration = Calibration(pipeline, request, CANDIDATES, tmp_path)
    losses = calibration.measure(["red"])
    assert (losses.density >= 0.5).all()
    choice = choose_within(losses, CANDIDATES, error=1.0)
    assert calibration.schedule(choice).dense_first_steps == 1


def test_overrides_are_what_is_to_be_found(pipeline, tmp_path):
    rules = Schedule(algorithm=parse("dense"), layer_overrides={0: parse("nabla-0.5")})
    with pytest.raises(ValueError, match="overrides"):
        Calibration(
            pipeline,
            replace(REQUEST, sparse_algo="dense", schedule=rules),
            CANDIDATES,
            tmp_path,
        )


def test_what_was_measured_is_kept(pipeline, tmp_path, monkeypatch):
    first = Calibration(pipeline, REQUEST, CANDIDATES, tmp_path).measure(["red", "blue"])
    monkeypatch.setattr(run_module, "generate", None)
    again = Calibration(pipeline, REQUEST, CANDIDATES, tmp_path).measure(["red", "blue"])
    assert np.array_equal(first.error, again.error)
    with pytest.raises(ValueError, match="other settings: seed 0, now 1"):
        Calibration(pipeline, replace(REQUEST, seed=1), CANDIDATES, tmp_path).measure(["red"])
    with pytest.raises(ValueError, match="candidates"):
        Calibration(pipeline, REQUEST, CANDIDATES[1:], tmp_path).measure(["red"])


def test_the_command_writes_a_schedule_that_generate_takes(tiny_wan, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    options = [f"--model={tiny_wan}", f"--output={tmp_path / 'run'}", f"--prompts={prompts}", *SIZE]
    options += ["--sparse-algo=nabla-0.3", "--sparse-algo=nabla-0.6"]
    result = CliRunner().invoke(app, ["calibrate", "--density=0.5", *options])
    assert result.exit_code == 0, result.output
    assert "this schedule" in result.output
    found = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert found == ["p0000.json", "p0001.json", "schedule.json"]
    schedule = tmp_path / "run" / "schedule.json"
    before = schedule.read_text()
    result = CliRunner().invoke(app, ["calibrate", "--error=0", *options])
    assert result.exit_code == 0, result.output
    assert (
        json.loads(schedule.read_text())["algorithm"] == "dense" != json.loads(before)["algorithm"]
    )
    schedule.write_text(before)
    video = f"--output={tmp_path / 'a.mp4'}"
    options = [f"--model={tiny_wan}", f"--schedule={schedule}", video, *SIZE]
    result = CliRunner().invoke(app, ["generate", "--prompt=red", *options])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "one budget"),
        (["--density=0.2", "--error=0.1"], "one budget"),
        (["--density=0.2", "--sparse-algo=dense"], "nothing to choose from"),
        (["--density=1.5"], "less than or equal to 1"),
    ],
)
def test_bad_input_is_one_line(options, message):
    result = CliRunner().invoke(app, ["calibrate", *options])
    assert result.exit_code == 2
    assert message in result.output
