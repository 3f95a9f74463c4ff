import json
import shutil
from pathlib import Path

import pytest
import torch
from tests.training.tiny_pipelines import wan_i2v
from typer.testing import CliRunner

from nabla_attn.cli import app
from nabla_attn.config import parse
from nabla_attn.generation.pipeline import load_pipeline
from nabla_attn.moving_shapes.judge import MovingShapesScorer
from nabla_attn.schedule import Schedule
from nabla_attn.training.job import make_sampler
from nabla_attn.training.metrics import read_log
from nabla_attn.training.recipes import read_config

WORLD = ("data.folder=world", "data.clips=3", "data.validation=1", "data.frames=5")
SIZE = ("data.height=32", "data.width=32", "watch.tensorboard=false")
SMALL = (*WORLD, *SIZE, "watch.prompts=0")


@pytest.fixture(autouse=True)
def _plain_world(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def nabla_train(*arguments):
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def one_line(result, *words):
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and result.stderr.strip().endswith(lines[0]), result.stderr
    for word in words:
        assert word in lines[0], lines[0]


def test_check_shows_what_would_happen_and_writes_nothing(tiny_wan, tmp_path):
    folder = tmp_path / "run"
    result = nabla_train("distill", "--check", "--output", folder, f"model={tiny_wan}", *SMALL)
    assert result.exit_code == 0, result.output
    for word in ("WanTransformer3DModel", "2 clips of 1 grid, 1 held out", "8 tokens"):
        assert word in result.stdout
    for word in (
        "distillation",
        "density",
        "1,600",
        "nothing was trained",
        "of weights",
        "at most",
    ):
        assert word in result.stdout
    assert not folder.exists()


def test_a_run_is_saved_with_its_configuration_and_generates(tiny_wan, tmp_path):
    folder = tmp_path / "run"
    yaml = tmp_path / "small.yaml"
    yaml.write_text("steps: 5\nwatch: {prompts: 1, sample: 2}\n")
    arguments = ("finetune", f"model={tiny_wan}", *WORLD, *SIZE, "--config", yaml)
    result = nabla_train(*arguments, "steps=2", "--output", folder)
    assert result.exit_code == 0, result.output
    saved = json.loads((folder / "config.json").read_text())
    assert saved["steps"] == 2 and saved["data"]["frames"] == 5
    assert (folder / "pipeline" / "model_index.json").is_file()
    assert (folder / "samples" / "step-00000002.png").is_file()
    (row,) = [row for row in read_log(folder) if row["step"] == "2"]
    assert 0 <= float(row["right_colour"]) <= 1 and float(row["validation"]) > 0
    one_line(nabla_train(*arguments, "--output", folder), "--resume")
    again = nabla_train(*arguments, "steps=3", "--output", folder, "--resume")
    one_line(again, "steps: 2 -> 3", "--allow-changes")


def test_alone_it_lists_what_there_is_and_starts_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = nabla_train()
    assert result.exit_code == 0
    for word in ("pretrain", "finetune", "distill", "builtin", "nabla train distill --check"):
        assert word in result.stdout
    assert not list(tmp_path.iterdir())
    for arguments in (["steps=3"], ["--resume"], ["--check"], ["--output", "run"]):
        one_line(nabla_train(*arguments), "no recipe given", "builtin")
    assert not list(tmp_path.iterdir())


def test_before_the_first_step_what_differs_and_what_it_takes(tiny_wan, tmp_path):
    arguments = ("finetune", f"model={tiny_wan}", *SMALL, "steps=2")
    result = nabla_train(*arguments, "--output", tmp_path / "run")
    assert result.exit_code == 0, result.output
    for word in (
        "steps: 2000 -> 2",
        "data.clips: 256 -> 3",
        "2 clips of 1 grid, 1 held out",
        "of weights",
        "2, of 1 clip each",
        "time:    about",
    ):
        assert word in result.stderr, word
    # What the recipe says already is in the file alone.
    assert "optim.betas" not in result.stderr and "checkpoint.keep" not in result.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["checkpoint"]["keep"] == 2


def test_a_log_file_gets_lines_and_quiet_nothing(tiny_wan, tmp_path):
    arguments = ("finetune", f"model={tiny_wan}", *SMALL, "steps=3")
    logged = nabla_train(*arguments, "--output", tmp_path / "a")
    lines = [line for line in logged.stderr.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1/3", "3/3"]
    assert all("loss" in line and "tokens/s" in line for line in lines)
    quiet = nabla_train(*arguments, "--output", tmp_path / "b", "--quiet")
    assert quiet.exit_code == 0 and quiet.stderr == ""


def test_lines_come_every_some_seconds_with_the_time_left():
    from nabla_attn.cli import progress
    from nabla_attn.training.metrics import StepMetrics

    seconds = iter(range(0, 2000, 10))
    show, said = progress._lines(lambda: next(seconds)), []
    progress.typer.echo, echo = lambda text, err: said.append(text), progress.typer.echo
    try:
        for step in range(1, 11):
            show(StepMetrics(step, 10, {"loss": 0.5, "tokens_per_second": 2048.0}, stage="small"))
    finally:
        progress.typer.echo = echo
    steps = [line.split()[2] for line in said]
    assert steps == ["1/10", "4/10", "7/10", "10/10"]
    assert said[1] == "small step 4/10  loss 0.5  2,048 tokens/s  ETA 1 min 00 s"


def test_results_as_json(tiny_wan, tmp_path):
    arguments = ("finetune", f"model={tiny_wan}", *SMALL, "steps=1", "--json")
    checked = json.loads(nabla_train(*arguments, "--check", "--output", tmp_path / "a").stdout)
    assert checked["stages"]["a"]["steps"] == "1, of 1 clip each"
    result = json.loads(nabla_train(*arguments, "--output", tmp_path / "a").stdout)
    assert result["result"] == str(tmp_path / "a" / "pipeline")
    assert result["numbers"]["steps"] == 1 and Path(result["record"]).is_file()
    assert result["use"] == f"--model {tmp_path / 'a' / 'pipeline'}"


@pytest.mark.parametrize("mode", [[], ["--check"]])
def test_a_run_that_cannot_start_leaves_no_folder(tiny_wan, tmp_path, mode):
    folder = tmp_path / "runs" / "deep" / "run"
    arguments = ("finetune", f"model={tiny_wan}", *SMALL, "data.height=33", *mode)
    one_line(nabla_train(*arguments, "--output", folder), "33")
    assert not list(tmp_path.glob("runs*"))
    # One that was there stays.
    folder.mkdir(parents=True)
    one_line(nabla_train(*arguments, "--output", folder), "33")
    assert folder.is_dir()


def test_stages_hand_on_their_weights(tiny_wan, tmp_path):
    yaml = tmp_path / "stages.yaml"
    yaml.write_text(
        "stages:\n- {name: small, steps: 1, height: 32}\n- {name: large, steps: 2, height: 48}\n"
    )
    folder = tmp_path / "run"
    arguments = ("pretrain", f"model={tiny_wan}", *SMALL, "--config", yaml, "--output", folder)
    result = nabla_train(*arguments)
    assert result.exit_code == 0, result.output
    assert (folder / "small" / "pipeline").is_dir() and (folder / "large" / "pipeline").is_dir()
    before = (folder / "small" / "training.json").stat().st_mtime_ns
    shutil.rmtree(folder / "large")
    assert nabla_train(*arguments, "--resume").exit_code == 0
    assert (folder / "small" / "training.json").stat().st_mtime_ns == before
    assert (folder / "large" / "pipeline").is_dir()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["distil"], ["distil", "Did you mean distill?", "builtin"]),
        (["finetune", "optim.lrate=1"], ["optim.lrate", "Did you mean optim.lr"]),
        (["finetune", "optim.lr=fast"], ["optim.lr", "a number"]),
        (["finetune", "optim.lr"], ["key=value"]),
        (["finetune", "--config", "none.yaml"], ["none.yaml", "No such file"]),
        (["finetune", "model=nowhere", "data.folder=x"], ["nowhere"]),
        (["finetune", "data.folder=nowhere"], ["nowhere", "nabla encode"]),
        (["builtin", "steps=3"], ["builtin", "no overrides"]),
        (["finetune", "--recipe", "distill"], ["two recipes"]),
        (["finetune", "--threads", "-1"], ["threads"]),
    ],
)
def test_bad_input_is_one_line(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one_line(nabla_train(*arguments, "--output", tmp_path / "run"), *words)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["sharding=fsdp"], ["needs GPUs"]),
        (["data.frames=6"], ["6 frames"]),
        (["data.height=33"], ["33"]),
        (["data.validation=3"], ["none is left to train on"]),
        (["lora.rank=2", "lora.targets=to_x"], ["to_x"]),
        (["context_parallel=2"], ["context_parallel=2", "1 processes"]),
        (["part=transformer_2"], ["transformer_2"]),
        (["sparsity.backend=magic"], ["magic"]),
        (["sparsity.schedule=none.json"], ["none.json"]),
    ],
)
def test_what_does_not_fit_the_model_is_one_line(tiny_wan, tmp_path, overrides, words):
    arguments = ("finetune", f"model={tiny_wan}", *SMALL, *overrides)
    one_line(nabla_train(*arguments, "--output", tmp_path / "run"), *words)
    assert not (tmp_path / "run" / "log.csv").exists()


@pytest.mark.parametrize("is_saved", [False, True])
def test_what_was_not_saved_is_not_said_to_be(tiny_wan, tmp_path, monkeypatch, is_saved):
    def stop(config, model, folder, **options):
        if is_saved:
            (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr("nabla_attn.training.job.train", stop)
    result = nabla_train("finetune", f"model={tiny_wan}", *SMALL, "--output", tmp_path / "run")
    assert result.exit_code == 130 and ("saved" in result.stderr) == is_saved


def test_too_little_memory_is_one_line(tiny_wan, tmp_path, monkeypatch):
    def fill(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nSee ...")

    monkeypatch.setattr("nabla_attn.training.job.train", fill)
    result = nabla_train("finetune", f"model={tiny_wan}", *SMALL, "--output", tmp_path / "run")
    one_line(result, "9 GiB", "gradient_checkpointing=true")


def test_samples_follow_the_schedule(tiny_wan, tmp_path, monkeypatch):
    path = tmp_path / "schedule.json"
    schedule = Schedule(algorithm=parse("nabla-0.3"), dense_first_steps=1, dense_layers=(0,))
    path.write_text(schedule.to_json())
    requests = []
    monkeypatch.setattr(
        "nabla_attn.training.job.SampleMaker",
        lambda pipeline, request, *_: requests.append(request),
    )
    config = read_config("finetune", [*WORLD, f"sparsity.schedule={path}"])
    pipeline = load_pipeline(tiny_wan, device="cpu")
    rest = ((5, 32, 32), MovingShapesScorer())
    make_sampler(config, tiny_wan, tmp_path, pipeline, *rest)
    assert [request.schedule for request in requests] == [schedule]
    shared = read_config("finetune", [*WORLD, "context_parallel=2"])
    with pytest.warns(UserWarning, match="no samples"):
        assert (
            make_sampler(shared, tiny_wan, tmp_path, pipeline, (5, 32, 32), MovingShapesScorer())
            is None
        )
    with pytest.warns(UserWarning, match="no samples are made of pipelines that take an image"):
        assert (
            make_sampler(config, tiny_wan, tmp_path, wan_i2v(), (5, 32, 32), MovingShapesScorer())
            is None
        )


def test_other_models_need_data_of_their_own(tiny_wan):
    one_line(nabla_train("finetune", f"model={tiny_wan}"), "data.folder", "nabla encode")


def test_a_model_without_vae_is_named(tiny_wan, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_wan, broken)
    shutil.rmtree(broken / "vae")
    for folder, words in (("world", "vae"), (tmp_path, "nabla encode")):
        arguments = ("finetune", f"model={broken}", f"data.folder={folder}", "--check")
        result = nabla_train(*arguments, "--output", tmp_path / "run")
        assert result.exit_code == 2 and words in " ".join(result.stderr.split())


def test_data_of_another_model_is_refused_before_training(tiny_wan, tmp_path):
    from tests.tiny_diffusers import tiny_wan_pipeline

    other = tiny_wan_pipeline(tmp_path / "other", text_dim=24)
    encoded = tmp_path / "encoded"
    sizes = ("--height", "32", "--width", "32", "--frames", "5", "--clips", "3")
    made = CliRunner().invoke(
        app, ["encode", "world", "--model", str(tiny_wan), "--output", str(encoded), *sizes]
    )
    assert made.exit_code == 0, made.output
    arguments = ("finetune", f"data.folder={encoded}", "data.validation=1", "watch.prompts=0")
    output = ("--output", tmp_path / "run")
    one_line(nabla_train(*arguments, f"model={other}", *output), "cannot take", "Encode the data")
    shown = nabla_train(*arguments, f"model={tiny_wan}", "--check", *output)
    assert shown.exit_code == 0, shown.output
