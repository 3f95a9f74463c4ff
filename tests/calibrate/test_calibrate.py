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
from nabla_attn.calibrate.budget import Budget, choose_by_density, choose_by_error
from nabla_attn.calibrate.candidates import (
    SHARES,
    THRESHOLDS,
    CandidateLosses,
    read_candidates,
)
from nabla_attn.calibrate.job import CalibrateJob
from nabla_attn.calibrate.run import Calibration
from nabla_attn.calibrate.units import Units, one_for_all, taken, to_schedule
from nabla_attn.cli import app
from nabla_attn.evaluation.probe import AttentionProbe
from nabla_attn.generation.generate import generate
from nabla_attn.generation.pipeline import load_pipeline
from nabla_attn.generation.request import GenerationRequest
from nabla_attn.record import RunRecord, collect_versions

REQUEST = GenerationRequest(prompt="red", height=144, width=176, frames=5, steps=2)
CANDIDATES = read_candidates(["nabla-0.3", "topk-0.3_tail-first", "sta-1-1-1"])
SIZE = ["--height=144", "--width=176", "--frames=5", "--steps=2", "--dtype=float32"]


@pytest.fixture(scope="module")
def pipeline(tiny_wan):
    return load_pipeline(tiny_wan, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def measured(pipeline, tmp_path_factory):
    """A folder with one prompt's losses, and these."""
    folder = tmp_path_factory.mktemp("calibrate")
    calibration = Calibration(pipeline, REQUEST, CANDIDATES, folder)
    return calibration, calibration.measure(["red"])


def random_losses(shape, seed):
    rng = np.random.default_rng(seed)
    return CandidateLosses(*(rng.random(shape) for _ in range(3)))


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
    ranges=st.integers(1, 2),
    by=st.sampled_from(["head", "layer"]),
    seed=st.integers(0, 1000),
    budget=st.floats(0.01, 1),
    what=st.sampled_from(["density", "error"]),
)
def test_the_choice_is_the_best_of_all_within_the_budget(ranges, by, seed, budget, what):
    losses = random_losses((2, 1, 2, 3), seed)
    units = Units((2, 1, 2), ranges, by)
    spent, cost = losses.density, losses.error
    if what == "error":
        spent, cost = cost, spent
    count = units.numbers.max() + 1
    every = [np.array(each)[units.numbers] for each in itertools.product(range(3), repeat=count)]
    fitting = [taken(cost, each).mean() for each in every if taken(spent, each).mean() <= budget]

    def choose():
        if what == "error":
            return choose_by_error(losses, units, budget)
        return choose_by_density(losses, units, losses.error, budget)

    if not fitting:
        with pytest.raises(ValueError, match="not possible: these algorithms reach"):
            choose()
        return
    choice = choose()
    reached = {"density": choice.density, "error": choice.error}
    assert reached.pop(what) <= budget + 1e-6
    assert reached.popitem()[1] == pytest.approx(min(fitting), abs=1e-6)


def test_units_are_layers_or_heads_in_ranges_of_steps():
    by_head, by_layer = (Units((3, 2, 2), 2, by).numbers for by in ("head", "layer"))
    assert by_head[:, 1, 1].tolist() == [3, 3, 7] and len(np.unique(by_head)) == 8
    assert by_layer[:, 1, 1].tolist() == [1, 1, 3] and len(np.unique(by_layer)) == 4
    for wrong in ({"ranges": 4}, {"ranges": 0}, {"by": "step"}):
        with pytest.raises(ValueError, match="got"):
            Units((3, 2, 2), **wrong)


@given(st.integers(0, 1000))
def test_a_schedule_says_what_was_picked_with_few_rules(seed):
    picked = np.random.default_rng(seed).integers(0, 3, (3, 2, 3))
    candidates = [parse(text) for text in ("nabla-0.2", "topk-0.3_tail-first", "dense")]
    schedule = to_schedule(picked, candidates)
    for step, layer, head in np.ndindex(picked.shape):
        assert schedule.config_for(step, layer, head=head) == candidates[picked[step, layer, head]]
    assert len(schedule.rules) <= 3 * 2 * 2
    same = to_schedule(np.zeros((3, 2, 3), int), candidates)
    assert same == Schedule(algorithm=candidates[0])
    picked = np.zeros((3, 2, 3), int)
    picked[1:, :, 2] = 1
    (rule,) = to_schedule(picked, candidates).rules
    assert (rule.layers, rule.heads, rule.steps) == (None, (2,), (1, 2))


def test_losses_are_those_of_a_probe_where_the_maps_are_the_same(pipeline, tmp_path):
    # With everything kept so far, the first layer of the first step sees the same tokens.
    run = replace(REQUEST, steps=1)
    losses = Calibration(pipeline, run, CANDIDATES, tmp_path).measure(["red"])
    assert losses.density.shape == (1, 2, 2, len(CANDIDATES))
    for number, config in enumerate(CANDIDATES[:-1]):
        probe = AttentionProbe(num_steps=1)
        schedule = Schedule(algorithm=config)
        wanted = replace(run, sparse_algo=str(config), schedule=schedule)
        generate(pipeline, wanted, on_apply=probe.attach)
        expected = probe.result().values
        density = expected["density"][0, 0].numpy()
        if config.tail is None:
            assert losses.density[0, 0, :, number] == pytest.approx(density, abs=1e-5)
        else:
            # Summaries of dropped blocks count as what they cost.
            summaries = losses.density[0, 0, :, number] - density
            assert (summaries > 0).all() and (summaries < 1 / 16).all()
        error = expected["output_error"][0, 0].numpy()
        assert losses.error[0, 0, :, number] == pytest.approx(error, abs=1e-5)
    assert (losses.density[..., -1] == 1).all()
    assert (losses.error[..., -1] == 0).all() and (losses.noise[..., -1] == 0).all()
    # The noise of one head is at most what all heads together lose.
    assert (losses.noise[0, 0, :, 0] > 0).all() and losses.noise[0, 0, :, 0].sum() < 4


def test_a_schedule_runs_as_predicted(pipeline, tmp_path):
    run = replace(REQUEST, steps=1)
    calibration = Calibration(pipeline, run, CANDIDATES, tmp_path)
    losses = calibration.measure(["red"])
    singles = one_for_all(losses)
    budget = (singles[0].density + singles[2].density) / 2
    units = Units(losses.density.shape[:3])
    choice = choose_by_density(losses, units, losses.error, budget)
    schedule = calibration.schedule(choice.picked)
    assert Schedule.from_json(schedule.to_json()) == schedule
    assert len({*choice.picked.ravel().tolist()}) > 1
    run = calibration.run_of("red", schedule)
    _, record = generate(pipeline, run)
    numbers = record.numbers["attention"]
    assert numbers["density"] + numbers["tail_density"] == pytest.approx(choice.density, rel=0.05)
    with pytest.raises(ValueError, match=r"steps 1, here 2.*--allow-mismatch"):
        generate(pipeline, replace(run, steps=2))


def test_dense_steps_stay_dense_and_count(pipeline, tmp_path):
    rules = Schedule(algorithm=parse("dense"), dense_first_steps=1)
    request = replace(REQUEST, sparse_algo="dense", schedule=rules)
    calibration = Calibration(pipeline, request, CANDIDATES, tmp_path)
    losses = calibration.measure(["red"])
    assert (losses.density[0] == 1).all() and (losses.density[1, ..., 0] < 1).all()
    choice = choose_by_error(losses, Units(losses.density.shape[:3]), 1.0)
    assert calibration.schedule(choice.picked).dense_first_steps == 1


def test_overrides_are_what_is_to_be_found(pipeline, tmp_path):
    rules = Schedule(algorithm=parse("dense"), layer_overrides={0: parse("nabla-0.5")})
    with pytest.raises(ValueError, match="overrides"):
        Calibration(
            pipeline,
            replace(REQUEST, sparse_algo="dense", schedule=rules),
            CANDIDATES,
            tmp_path,
        )


def test_what_was_measured_is_kept(pipeline, measured, monkeypatch):
    calibration, first = measured
    monkeypatch.setattr(run_module, "generate", None)
    again = calibration.measure(["red"])
    assert np.array_equal(first.error, again.error)
    seen = calibration.seen()
    assert (seen.calls, seen.batch, seen.heads, seen.tokens) == (4, 1, 2, (2, 9, 11))
    folder = calibration.folder
    with pytest.raises(ValueError, match="other settings: seed 0, now 1"):
        Calibration(pipeline, replace(REQUEST, seed=1), CANDIDATES, folder).measure(["red"])
    with pytest.raises(ValueError, match="candidates"):
        Calibration(pipeline, REQUEST, CANDIDATES[1:], folder).measure(["red"])


def test_folders_that_lack_heads_or_losses_are_refused(measured, tmp_path):
    calibration, _ = measured
    record = RunRecord.load(calibration.folder / "p0000.json")
    older = RunRecord("calibrate", {}, 0, collect_versions(), "cpu", {"density": [], "error": []})
    older.save(tmp_path / "p0000.json")
    again = replace(calibration, folder=tmp_path)
    with pytest.raises(ValueError, match="measured by layer, without heads and steps"):
        again.measure(["red"])
    record.save(tmp_path / "p0000.json")
    with pytest.raises(ValueError, match=r"p0000\.safetensors holds no losses"):
        again.measure(["red"])


def test_the_error_model_is_measured_once_and_checked_on_other_prompts(measured, monkeypatch):
    calibration, _ = measured
    job = CalibrateJob(
        calibration, ["red"], Budget(density=0.6), ranges=2, has_weights=True, held_out=["blue"]
    )
    result = job.run()
    assert result.distance is not None and result.distance > 0
    names = [each.name for each in result.checked]
    assert names[:2] == ["this schedule", "without weights"] and len(names) > 3
    assert all(each.predicted > 0 and each.measured > 0 for each in result.checked)
    assert result.fit is not None and 0.2 < result.fit.ratio < 5
    from nabla_attn.calibrate import weights as weights_module

    monkeypatch.setattr(weights_module, "final_latents", None)
    assert job.run().checked == result.checked
    with pytest.raises(ValueError, match="--weights measures"):
        replace(job, has_weights=False)


def test_the_command_writes_a_schedule_that_generate_takes(tiny_wan, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    options = [f"--model={tiny_wan}", f"--output={tmp_path / 'run'}", f"--prompts={prompts}", *SIZE]
    options += ["--sparse-algo=nabla-0.3", "--sparse-algo=nabla-0.6"]
    result = CliRunner().invoke(app, ["calibrate", "--density=0.5", *options])
    assert result.exit_code == 0, result.output
    assert "this schedule" in result.output
    found = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert found == [f"p000{i}.{end}" for i in (0, 1) for end in ("json", "safetensors")] + [
        "schedule.json"
    ]
    schedule = tmp_path / "run" / "schedule.json"
    before = schedule.read_text()
    result = CliRunner().invoke(app, ["calibrate", "--error=0", "--by=layer", *options])
    assert result.exit_code == 0, result.output
    assert (
        json.loads(schedule.read_text())["algorithm"] == "dense" != json.loads(before)["algorithm"]
    )
    schedule.write_text(before)
    video = f"--output={tmp_path / 'a.mp4'}"
    options = [f"--model={tiny_wan}", f"--schedule={schedule}", video, *SIZE]
    result = CliRunner().invoke(app, ["generate", "--prompt=red", *options])
    assert result.exit_code == 0, result.output
    options[-2] = "--steps=3"
    result = CliRunner().invoke(app, ["generate", "--prompt=red", *options])
    assert result.exit_code == 2 and "steps 2, here 3" in result.output
    result = CliRunner().invoke(app, ["generate", "--prompt=red", "--allow-mismatch", *options])
    assert result.exit_code == 0 and "steps 2, here 3" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "one budget"),
        (["--density=0.2", "--error=0.1"], "one budget"),
        (["--seconds=0"], "seconds must be more than 0"),
        (["--density=0.2", "--sparse-algo=dense"], "nothing to choose from"),
        (["--density=1.5"], "less than or equal to 1"),
    ],
)
def test_bad_input_is_one_line(options, message):
    result = CliRunner().invoke(app, ["calibrate", *options])
    assert result.exit_code == 2
    assert message in result.output


@pytest.fixture
def few_prompts(tmp_path, tiny_wan):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    options = [f"--model={tiny_wan}", f"--output={tmp_path / 'run'}", f"--prompts={prompts}", *SIZE]
    return [*options, "--sparse-algo=topk-*_tail-first", "--num-prompts=1", "--ranges=1"]


def test_seconds_predicted_and_measured_stand_side_by_side(few_prompts, tmp_path, monkeypatch):
    monkeypatch.setenv("NABLA_ATTN_CACHE", str(tmp_path / "cache"))
    result = CliRunner().invoke(app, ["calibrate", "--seconds=1000", *few_prompts])
    assert result.exit_code == 0, result.output
    for text in ("seconds in the transformer", "predicted", "measured", "by density, as many"):
        assert text in result.output
    (table,) = (tmp_path / "cache").glob("attention-seconds_*.json")
    before = table.read_text()
    result = CliRunner().invoke(app, ["calibrate", "--seconds=1000", "--json", *few_prompts])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert set(found["seconds"]) == {"dense", "this schedule", "by density, as many seconds"}
    assert found["seconds"]["dense"]["measured"] > 0 and table.read_text() == before


def test_the_command_says_how_good_the_error_model_is(few_prompts):
    asked = ["calibrate", "--density=0.6", "--weights", "--check=1"]
    result = CliRunner().invoke(app, [*asked, *few_prompts])
    assert result.exit_code == 0, result.output
    assert "rank correlation" in result.output and "without weights" in result.output
    found = json.loads(CliRunner().invoke(app, [*asked, "--json", *few_prompts]).stdout)
    assert found["distance"] > 0 and set(found["fit"]) == {"rank_correlation", "ratio", "spread"}
    for extra, message in (
        (["--check=2", "--weights"], "need 3: got 2"),
        (["--check=1"], "--weights measures"),
        (["--method=paro-0.3"], "takes no budget"),
    ):
        result = CliRunner().invoke(app, ["calibrate", "--density=0.6", *extra, *few_prompts])
        assert result.exit_code == 2 and message in result.output, result.output
