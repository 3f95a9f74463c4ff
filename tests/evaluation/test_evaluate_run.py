import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from nabla_attn import Schedule
from nabla_attn.cli import app
from nabla_attn.evaluation import run as run_module
from nabla_attn.evaluation.curves import draw_curves, draw_true_mass, kind_of, line_of, mean_maps
from nabla_attn.evaluation.match import bisect, match_algorithm
from nabla_attn.evaluation.probe import MEASURES, AttentionProbe
from nabla_attn.evaluation.prompts import make_items
from nabla_attn.evaluation.records import (
    pack_run,
    read_records,
    resample,
    summarise,
    summary_record,
)
from nabla_attn.evaluation.run import Evaluation, Measures, describe_weights
from nabla_attn.generation.generate import generate
from nabla_attn.generation.pipeline import load_pipeline
from nabla_attn.generation.request import GenerationRequest
from nabla_attn.moving_shapes.judge import MovingShapesScorer
from nabla_attn.record import RunRecord
from nabla_attn.viz.report import build_report

REQUEST = GenerationRequest(prompt="red", height=64, width=64, frames=5, steps=1)
MORE_BLOCKS = replace(REQUEST, height=144, width=176, steps=2)  # 2 x 2 x 2 blocks
ITEMS = make_items(["a red circle", "a blue square"], [0, 1])
ALGOS = ["nabla-0.2"]


@pytest.fixture(scope="module")
def pipeline(tiny_wan):
    return load_pipeline(tiny_wan, device="cpu", dtype="float32")


def evaluation(pipeline, folder, **changes):
    return Evaluation(
        pipeline,
        replace(REQUEST, **changes),
        folder,
        fps=8,
        measures=Measures(scorer=MovingShapesScorer(), num_probed=1),
    )


@pytest.fixture(scope="module")
def finished(pipeline, tmp_path_factory):
    """A run made by two processes, one after the other."""
    folder = tmp_path_factory.mktemp("run")
    for index in (0, 1):
        evaluation(pipeline, folder).run(ALGOS, ITEMS, shard=(index, 2))
    return folder


def test_every_algorithm_has_every_item(finished):
    for algo in ("dense", *ALGOS):
        names = {path.name for path in (finished / algo).iterdir()}
        assert {f"{item.name}{kind}" for item in ITEMS for kind in (".mp4", ".json")} <= names
        assert ("p0000-s0.probe.safetensors" in names) == (algo != "dense")
    record = RunRecord.load(finished / "nabla-0.2" / "p0001-s1.json")
    assert record.config["prompt"] == "a blue square"
    assert record.seed == 1
    assert record.numbers["memory_bytes"] > 1e6
    assert record.numbers["to_dense"]["psnr"] > 5
    assert "probe" not in record.numbers


def test_dense_is_compared_with_itself(finished):
    to_dense = RunRecord.load(finished / "dense" / "p0000-s0.json").numbers["to_dense"]
    assert to_dense["psnr"] is None
    assert to_dense["ssim"] == pytest.approx(1)


def test_a_finished_run_makes_nothing_and_an_interrupted_one_only_what_is_missing(
    pipeline, finished, monkeypatch
):
    made = []
    real = run_module.generate

    def counting(pipeline, request, **options):
        made.append((request.sparse_algo, request.seed))
        return real(pipeline, request, **options)

    monkeypatch.setattr(run_module, "generate", counting)
    evaluation(pipeline, finished).run(ALGOS, ITEMS)
    assert made == []
    before = RunRecord.load(finished / "nabla-0.2" / "p0001-s0.json")
    (finished / "nabla-0.2" / "p0001-s0.json").unlink()
    evaluation(pipeline, finished).run(ALGOS, ITEMS)
    assert made == [("dense", 0), ("nabla-0.2", 0)]
    after = RunRecord.load(finished / "nabla-0.2" / "p0001-s0.json")
    assert after.numbers["to_dense"] == before.numbers["to_dense"]


def test_other_settings_are_refused(pipeline, finished):
    with pytest.raises(ValueError, match="steps 1, now 3"):
        evaluation(pipeline, finished, steps=3).run(ALGOS, ITEMS)
    with pytest.raises(ValueError, match="prompt 'a red circle', now 'a dog'"):
        evaluation(pipeline, finished).run(ALGOS, make_items(["a dog"], [0]))
    with pytest.raises(ValueError, match="fps 8, now 12"):
        Evaluation(pipeline, REQUEST, finished, fps=12).run(ALGOS, ITEMS)
    rounded = load_pipeline(pipeline.config["_name_or_path"], device="cpu", dtype="bfloat16")
    with pytest.raises(ValueError, match="dtype 'float32', now 'bfloat16'"):
        evaluation(rounded, finished).run(ALGOS, ITEMS)
    with pytest.raises(ValueError, match="K from 0"):
        evaluation(pipeline, finished).run(ALGOS, ITEMS, shard=(2, 2))


def test_an_item_that_fails_stops_no_other(pipeline, tmp_path, monkeypatch):
    real = run_module.generate

    def fail_once(pipeline, request, **options):
        if request.prompt == "a red circle" and request.seed == 1:
            raise RuntimeError("out of\nmemory")
        return real(pipeline, request, **options)

    monkeypatch.setattr(run_module, "generate", fail_once)
    shared = evaluation(pipeline, tmp_path).run(ALGOS, ITEMS)
    assert shared.failed == {"p0000-s1": "out of memory"}
    assert shared.made == ["p0000-s0", "p0001-s0", "p0001-s1"]
    monkeypatch.undo()
    again = evaluation(pipeline, tmp_path).run(ALGOS, ITEMS)
    assert again.made == ["p0000-s1"] and len(again.there) == 3
    assert not list(tmp_path.glob(".*"))


def test_what_another_process_is_at_is_left_to_it(pipeline, tmp_path):
    import subprocess
    import sys

    code = (
        "import sys; from filelock import FileLock\n"
        "with FileLock(sys.argv[1]): print('held', flush=True); input()"
    )
    command = [sys.executable, "-c", code, tmp_path / ".p0000-s0.lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        shared = evaluation(pipeline, tmp_path).run(ALGOS, ITEMS[:2])
        holder.kill()
    assert (shared.made, shared.elsewhere) == (["p0000-s1"], ["p0000-s0"])


def test_a_measure_asked_for_later_is_made(pipeline, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    more = Measures(scorer=MovingShapesScorer(), num_probed=1, clip=lambda frames, prompt: 0.25)
    again = Evaluation(pipeline, REQUEST, tmp_path / "run", fps=8, measures=more)
    again.run(ALGOS, ITEMS[:1])
    records = [RunRecord.load(tmp_path / "run" / name / "p0000-s0.json") for name in ALGOS]
    assert [record.numbers["to_prompt"]["clip"] for record in records] == [0.25]


def test_other_weights_of_a_measure_are_refused_before_any_video(
    pipeline, finished, tmp_path, monkeypatch
):
    shutil.copytree(finished, tmp_path / "run")
    file, folder = tmp_path / "alex.pt", tmp_path / "clip"
    folder.mkdir()
    for path in (file, folder / "model.safetensors"):
        path.write_bytes(b"old")
    measures = {"lpips": lambda ours, reference: [0.5], "clip": lambda frames, prompt: 0.25}

    def run(items, **places):
        weights = {name: describe_weights(path) for name, path in places.items()}
        more = Measures(
            scorer=MovingShapesScorer(),
            num_probed=1,
            weights=weights,
            **{name: measures[name] for name in places},
        )
        Evaluation(pipeline, REQUEST, tmp_path / "run", fps=8, measures=more).run(ALGOS, items)

    # The second prompt alone, so that the first lacks what the second was measured with.
    run(ITEMS[2:3], lpips=file, clip=folder)
    config = RunRecord.load(tmp_path / "run" / "dense" / f"{ITEMS[2].name}.json").config
    assert config["lpips_weights"].startswith("alex.pt ")
    assert config["clip_weights"].startswith("clip ")
    monkeypatch.setattr(run_module, "generate", lambda *_, **__: pytest.fail("it made a video"))
    run(ITEMS[2:3], lpips=file, clip=folder)
    run(ITEMS)
    (folder / "model.safetensors").write_bytes(b"new")
    with pytest.raises(ValueError, match=r"clip_weights 'clip \w{16}', now 'clip \w{16}'"):
        run(ITEMS, lpips=file, clip=folder)
    with pytest.raises(ValueError, match=r"lpips_weights 'alex.pt \w{16}', now 'clip"):
        run(ITEMS, lpips=folder)


def test_scores_of_another_judge_are_refused(pipeline, tmp_path, monkeypatch):
    items = make_items(["a red circle moving right"], [0])
    evaluation(pipeline, tmp_path).run(ALGOS, items)
    record = RunRecord.load(tmp_path / "dense" / "p0000-s0.json")
    assert record.config["world_judge"] == MovingShapesScorer.version
    assert record.numbers["to_prompt"]["world"].keys() >= {"all", "shape", "outline", "stains"}
    monkeypatch.setattr(MovingShapesScorer, "version", "next")
    with pytest.raises(ValueError, match="world_judge '2', now 'next'"):
        evaluation(pipeline, tmp_path).run(ALGOS, items)


def test_nothing_is_carried_over_from_a_run_of_another_size(pipeline):
    # Tables of one size must not serve another (a stale cache seen elsewhere).
    small, large = (
        replace(request, sparse_algo="nabla-0.4", steps=1) for request in (REQUEST, MORE_BLOCKS)
    )
    first, _ = generate(pipeline, small)
    big, _ = generate(pipeline, large)
    assert np.array_equal(first, generate(pipeline, small)[0])
    assert np.array_equal(big, generate(pipeline, large)[0])


def test_the_probe_agrees_with_telemetry_and_counts_density_not_sparsity(pipeline):
    values = {}
    for algo in ("nabla-0.2", "nabla-0.9"):
        probe = AttentionProbe(MORE_BLOCKS.steps)
        _, record = generate(
            pipeline, replace(MORE_BLOCKS, sparse_algo=algo), on_apply=probe.attach
        )
        values[algo] = probe.result().to_dict()
        attention = record.numbers["attention"]
        # Density is kept pairs / all pairs: little mass kept means a low density, not a high one.
        assert values[algo]["density"] == pytest.approx(attention["density"], abs=1e-5)
        assert values[algo]["kept_mass"] == pytest.approx(attention["kept_mass"], abs=1e-5)
    low, high = values["nabla-0.2"], values["nabla-0.9"]
    assert low["density"] < high["density"]
    assert 0.2 <= low["kept_mass"] < high["kept_mass"]
    assert low["true_mass"] < high["true_mass"] <= high["best_mass"] + 1e-6 <= 1 + 2e-6
    assert low["output_error"] > high["output_error"] >= 0


def test_dense_steps_lose_nothing_in_the_probe(pipeline):
    schedule = replace(Schedule.default("nabla-0.2"), dense_first_steps=1)
    probe = AttentionProbe(2)
    request = replace(MORE_BLOCKS, sparse_algo="nabla-0.2", schedule=schedule)
    generate(pipeline, request, on_apply=probe.attach)
    values = probe.result().values
    assert set(values) == set(MEASURES)
    assert (values["true_mass"][0] == 1).all()
    assert (values["output_error"][0] == 0).all()
    assert (values["true_mass"][1] < 1).all()


def test_summary_of_a_run(finished):
    records = read_records(finished)
    summary = summarise(records)
    assert list(summary) == ["dense", "nabla-0.2"]
    low = summary["nabla-0.2"]
    assert low["ssim"]["count"] == 4
    assert low["ssim"]["prompts"] == 2
    assert low["true_mass"]["count"] == 2  # the seeds of the one probed prompt
    assert low["ssim"]["low"] <= low["ssim"]["value"] <= low["ssim"]["high"]
    assert summary["dense"]["psnr"]["value"] is None
    mean = np.mean([record.numbers["to_dense"]["ssim"] for record in records["nabla-0.2"].values()])
    assert low["ssim"]["value"] == pytest.approx(mean, abs=1e-6)
    assert low["density"]["difference"][0] == pytest.approx(
        low["density"]["value"] - summary["dense"]["density"]["value"], abs=1e-5
    )
    record = summary_record(records)
    assert RunRecord.from_json(record.to_json()) == record


def test_a_packed_run_is_read_as_the_run_it_came_from(finished, tmp_path):
    assert pack_run(finished, tmp_path / "packed") == 4
    assert read_records(tmp_path / "packed") == read_records(finished)
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")}
    folders = ("dense", "nabla-0.2")
    assert names == {f"packed/{name}.jsonl" for name in folders} | {
        "packed/nabla-0.2",
        *(f"packed/{name}/p0000-s0.mp4" for name in folders),
    }
    reports = [build_report([folder]) for folder in (finished, tmp_path / "packed")]
    assert reports[0] == reports[1]


def test_means_are_over_the_same_videos(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "nabla-0.2" / "p0001-s0.json").unlink()
    with pytest.warns(UserWarning, match="1 of 4 items are left out"):
        records = read_records(tmp_path / "run")
    assert {len(items) for items in records.values()} == {3}
    for path in (tmp_path / "run" / "nabla-0.2").glob("p*.json"):
        path.unlink()
    first = RunRecord.load(finished / "nabla-0.2" / "p0000-s0.json")
    other = replace(first, config=first.config | {"prompt_index": 9})
    other.save(tmp_path / "run" / "nabla-0.2" / "p0009-s0.json")
    with pytest.raises(ValueError, match=r"no item that all of dense, nabla-0\.2"):
        read_records(tmp_path / "run")


@pytest.mark.filterwarnings("ignore:.*left out")
def test_an_item_that_one_algorithm_lacks_is_not_packed(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "nabla-0.2" / "p0001-s0.json").unlink()
    result = CliRunner().invoke(
        app, ["evaluate", "pack", str(tmp_path / "run"), str(tmp_path / "packed")]
    )
    assert result.exit_code == 0, result.output
    assert "3 items" in result.output
    assert "p0001-s0" not in read_records(tmp_path / "packed")["dense"]


def test_a_broken_line_of_a_packed_run_is_named(finished, tmp_path):
    pack_run(finished, tmp_path)
    with (tmp_path / "dense.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(ValueError, match=r"dense.jsonl, line 5: run record: missing"):
        read_records(tmp_path)


def test_a_record_cannot_choose_where_files_go(finished, tmp_path):
    record = RunRecord.load(finished / "dense" / "p0000-s0.json")
    config = record.config | {"sparse_algo": "../../elsewhere"}
    replace(record, config=config).save(tmp_path / "run" / "dense" / "p0000-s0.json")
    shutil.copy(finished / "dense" / "p0000-s0.mp4", tmp_path / "run" / "dense")
    for command in ("pack", "vbench-write"):
        asked = ["evaluate", command, str(tmp_path / "run"), str(tmp_path / "a" / "b")]
        result = CliRunner().invoke(app, asked)
        assert result.exit_code == 2, result.output
        assert "elsewhere" in result.output
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_a_record_without_its_item_is_refused(finished, tmp_path):
    record = RunRecord.load(finished / "dense" / "p0000-s0.json")
    config = {key: value for key, value in record.config.items() if key != "prompt_index"}
    replace(record, config=config).save(tmp_path / "dense" / "p0000-s0.json")
    with pytest.raises(ValueError, match="prompt_index, prompt of a record are dense, None"):
        read_records(tmp_path)


def synthetic(values, algo="nabla-0.5", prompts=None, **numbers):
    names = prompts or [f"p{i}" for i in range(len(values))]
    return {
        f"p{i}": RunRecord(
            "evaluate", {"prompt": names[i], "sparse_algo": algo}, 0, {}, "",
            {"to_dense": {"psnr": value, "ssim": 0.5, "motion_psnr": None, "motion_ssim": 1.0}}
            | {name: entries[i] for name, entries in numbers.items()},
        )
        for i, value in enumerate(values)
    }  # fmt: skip


def test_what_only_some_videos_were_measured_for_is_over_the_same_videos():
    # An algorithm that came later was probed on fewer prompts.
    def probes(*masses):
        cells = [mass and [[mass]] for mass in masses]
        return [
            mass and {"true_mass": mass, "true_mass_per_step_and_layer": cell, "density": mass / 2}
            for mass, cell in zip(masses, cells, strict=True)
        ]

    records = {"dense": synthetic([None] * 3, "dense")}
    for algo, masses in (("nabla-0.5", (0.9, 0.1, 0.2)), ("topk-0.2", (0.8, None, None))):
        items = synthetic([20.0] * 3, algo, probe=probes(*masses))
        for record in items.values():
            if record.numbers["probe"] is None:
                del record.numbers["probe"]
        records[algo] = items
    summary = summarise(records)
    for algo, mass in (("nabla-0.5", 0.9), ("topk-0.2", 0.8)):
        assert summary[algo]["true_mass"]["value"] == mass
        assert summary[algo]["true_mass"]["count"] == 1
        assert summary[algo]["probe_density"]["value"] == mass / 2
        assert summary[algo]["ssim"]["count"] == 3
    assert mean_maps(records, "true_mass") == {"nabla-0.5": [[0.9]], "topk-0.2": [[0.8]]}
    assert "true_mass" not in summary["dense"]


def test_one_run_that_was_held_up_does_not_move_the_seconds():
    times = [[{"transformer": s} for s in row] for row in ((5.0, 5.0, 5.0), (2.0, 900.0, 2.0))]
    records = {
        "dense": synthetic([None] * 3, "dense", seconds=times[0]),
        "nabla-0.5": synthetic([20.0] * 3, seconds=times[1]),
    }
    found = summarise(records)["nabla-0.5"]["seconds"]
    assert found["value"] == 2.0 and found["difference"][0] == -3.0


def test_one_identical_video_does_not_make_the_mean_infinite():
    records = {"dense": synthetic([None] * 2, "dense"), "nabla-0.5": synthetic([None, 20.0])}
    mean = summarise(records)["nabla-0.5"]["psnr"]["value"]
    assert mean == pytest.approx(20 + 10 * np.log10(2), abs=1e-4)


def test_intervals_are_paired():
    # Videos differ widely, the algorithm changes each by the same: the difference is certain.
    times = [{"transformer": float(t)} for t in (1, 5, 20, 60, 2, 9)]
    faster = [{"transformer": t["transformer"] - 0.5} for t in times]
    records = {
        "dense": synthetic([None] * 6, "dense", seconds=times),
        "nabla-0.5": synthetic([20.0] * 6, seconds=faster),
    }
    entry = summarise(records)["nabla-0.5"]["seconds"]
    assert entry["difference"] == pytest.approx([-0.5, -0.5, -0.5])
    assert entry["high"] - entry["low"] > 10


def test_seeds_of_a_prompt_are_resampled_together():
    draws = resample({"a": [0, 1], "b": [2, 3]})
    assert {tuple(sorted(draw)) for draw in draws} == {(0, 0, 1, 1), (0, 1, 2, 3), (2, 2, 3, 3)}
    one = {"dense": synthetic([None] * 2, "dense", ["a", "a"])}
    one["nabla-0.5"] = synthetic([20.0, 30.0], prompts=["a", "a"])
    entry = summarise(one)["nabla-0.5"]["psnr"]
    assert (entry["low"], entry["high"]) == (None, None)  # one prompt gives no interval


def test_pictures_are_the_same_bytes_again(finished, tmp_path):
    records = read_records(finished)
    for name in ("a.png", "b.png"):
        draw_curves(summarise(records), tmp_path / name)
        draw_true_mass(records, tmp_path / f"losses-{name}")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "losses-a.png").read_bytes() == (tmp_path / "losses-b.png").read_bytes()
    assert set(mean_maps(records, "true_mass")) == set(ALGOS)
    names = ("nabla-0.4", "nabla-0.2_sta-3-3-3", "sta-3-3-3", "topk-0.2", "topk-0.2_sta-1-1-1")
    assert [kind_of(name) for name in names] == [
        "nabla", "nabla + window", "window", "top-k", "top-k + window",
    ]  # fmt: skip
    assert line_of("nabla-0.4") == ("nabla", "nabla")
    assert line_of("nabla-0.4_block-4-4-4") == ("nabla", "nabla, 4x4x4 blocks")


def test_bisection():
    found = bisect(lambda x: x**2, 0.25, tolerance=0.02)
    assert found.value == pytest.approx(0.5, abs=0.01)
    assert len(found.tried) <= 10
    assert bisect(lambda x: x, 1.0, tolerance=0.01).value == 1
    with pytest.raises(ValueError, match="cannot be reached"):
        bisect(lambda x: 0.3 + x, 0.1, tolerance=0.01)
    steps = bisect(lambda x: 0.2 if x < 0.4 else 0.8, 0.5, tolerance=0.01)
    assert len(steps.tried) == 10  # a jump over the target ends in the nearest, not for ever


def test_an_algorithm_is_matched_to_a_density(pipeline):
    algo, found = match_algorithm(
        pipeline, MORE_BLOCKS, "topk-*", ITEMS[:1], by="density", target=0.4, tolerance=0.15
    )
    assert algo.startswith("topk-0.")
    assert found.reached == pytest.approx(0.4, rel=0.2)
    wrong = (("nabla-0.4", "density", "must have one"), ("nabla-*", "x", "density"))
    for template, by, message in wrong:
        with pytest.raises(ValueError, match=message):
            match_algorithm(pipeline, REQUEST, template, ITEMS[:1], by=by, target=0.4)


def test_the_command(tiny_wan, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    arguments = [
        "evaluate", "--sparse-algo", "nabla-0.4", "--model", str(tiny_wan), "--device", "cpu",
        "--prompts", str(tmp_path / "prompts.txt"), "--num-probed", "1",
        "--height", "64", "--width", "64", "--frames", "5", "--steps", "1",
        "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "nabla-0.4" in result.output and "…" not in result.output
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"dense", "nabla-0.4", "summary.json", "curves.png", "losses.png"}
    assert len(list((tmp_path / "out" / "dense").glob("*.mp4"))) == 2, "all prompts of the file"
    again = CliRunner().invoke(app, ["evaluate", "summary", str(tmp_path / "out")])
    assert again.exit_code == 0, again.output
    json.loads((tmp_path / "out" / "summary.json").read_text())
    for wrong, message in (
        (["--sparse-algo", "nabla-*"], "--match"),
        (["--shard", "x"], "K/N"),
        (["--sparse-algo", "magic"], "magic"),
    ):
        result = CliRunner().invoke(app, [*arguments, *wrong])
        assert result.exit_code == 2
        assert message in result.output
