import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.training.clips import make_clips, small_config
from typer.testing import CliRunner

from nabla_attn.cli import app
from nabla_attn.cli.options import VideoOptions
from nabla_attn.config import parse
from nabla_attn.moving_shapes.dataset import MovingShapes
from nabla_attn.record import RunRecord
from nabla_attn.schedule import Schedule
from nabla_attn.training.job import check_job, run_job
from nabla_attn.training.metrics import draw_losses
from nabla_attn.training.model import load_parts
from nabla_attn.training.recipes import read_config
from nabla_attn.training.setup import prepare
from nabla_attn.training.train import train

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def test_fine_tuning_learns(tiny_wan, tmp_path, monkeypatch):
    monkeypatch.setattr("nabla_attn.training.train.draw_losses", draw_losses)
    entries = []
    config = small_config(
        steps=80, optim__lr=1e-2, optim__warmup=10, data__batch=4, ema=0.9, watch__validate=50
    )
    train(config, tiny_wan, tmp_path, dataset=make_clips(6), on_log=entries.append)
    losses = [entry.numbers["loss"] for entry in entries]
    first, last = sum(losses[:10]) / 10, sum(losses[-10:]) / 10
    # Measured: 1.63 to 0.22.
    assert last < 0.5 * first
    record = RunRecord.load(tmp_path / "training.json")
    assert record.numbers["steps"] == 80 and record.numbers["skipped"] == 0
    assert len(record.numbers["validation"]) == 2
    assert (tmp_path / "loss.png").stat().st_size > 5000
    assert json.loads((tmp_path / "config.json").read_text())["optim"]["lr"] == 1e-2


@pytest.fixture(scope="module")
def attentive(tiny_wan, tmp_path_factory):
    """A pipeline whose attention is sharp and weighs much, so that sparsity is felt."""
    folder = tmp_path_factory.mktemp("attentive") / "pipeline"
    shutil.copytree(tiny_wan, folder)
    weights = load_file(folder / WEIGHTS)
    for name, value in weights.items():
        if "attn1.to_out.0" in name or "attn1.norm_q" in name:
            weights[name] = value * 4
    save_file(weights, folder / WEIGHTS)
    return folder


def test_distilling_brings_the_student_to_its_teacher(attentive, tmp_path):
    config = small_config(
        "distill",
        steps=30,
        optim__lr=3e-3,
        data__batch=2,
        sparsity__algorithm="nabla-0.2",
        watch__validate=1,
    )
    entries = []
    train(config, attentive, tmp_path, dataset=make_clips(6), on_log=entries.append)
    errors = [entry.numbers["validation"] for entry in entries]
    # Measured: 0.062 to 0.028.
    assert min(errors[-10:]) < 0.7 * errors[0]


def test_a_student_learns_guidance_and_is_used_without(attentive, tmp_path):
    from nabla_attn.generation.request import ModelDefaults

    config = small_config(
        "distill", steps=30, optim__lr=3e-3, data__batch=2, objective__guidance=4, watch__validate=1
    )
    entries = []
    result = train(config, attentive, tmp_path, dataset=make_clips(6), on_log=entries.append)
    errors = [entry.numbers["validation"] for entry in entries]
    assert min(errors[-10:]) < 0.7 * errors[0], (errors[0], errors[-10:])
    assert ModelDefaults.load(attentive).guidance > 1
    assert ModelDefaults.load(result).guidance == 1


def test_what_is_saved_is_the_average(tiny_wan, tmp_path):
    config = small_config(steps=6, ema=0.9, optim__warmup=0)
    result = train(config, tiny_wan, tmp_path, dataset=make_clips(4))
    saved = load_file(result / WEIGHTS)
    (checkpoint,) = (tmp_path / "checkpoints").glob("*6")
    trained = load_file(checkpoint / "model.safetensors")
    average = load_file(checkpoint / "average.safetensors")
    parts = load_parts(tiny_wan).transformer
    for place, (name, start) in enumerate(parts.named_parameters()):
        assert torch.equal(saved[name], average[str(place)])
        assert not torch.equal(saved[name], trained[name]), name
        # Halfway: the average is closer to the start than the trained weights are.
        assert (saved[name] - start).norm() < (trained[name] - start).norm()


def test_the_result_is_a_pipeline_that_generates(tiny_wan, tmp_path):
    from nabla_attn.generation.generate import generate
    from nabla_attn.generation.pipeline import load_pipeline
    from nabla_attn.generation.request import GenerationRequest, ModelDefaults

    config = small_config(steps=1, sparsity__algorithm="nabla-0.4")
    result = train(config, tiny_wan, tmp_path, dataset=make_clips(4))
    assert ModelDefaults.load(result).sparse_algo == "nabla-0.4"
    pipeline = load_pipeline(result, device="cpu", dtype="float32")
    size = {"frames": 5, "height": 32, "width": 32, "steps": 2, "guidance": 1.0}
    video, _ = generate(pipeline, GenerationRequest("a red circle", **size))
    assert video.shape == (5, 32, 32, 3)


def test_the_result_keeps_the_schedule_and_generation_follows_it(tiny_wan, tmp_path, monkeypatch):
    rules = {"dense_first_steps": 1, "layer_overrides": {0: parse("nabla-0.9")}}
    schedule = Schedule(algorithm=parse("nabla-0.4"), **rules)
    path = tmp_path / "schedule.json"
    path.write_text(schedule.to_json())
    config = small_config(steps=1, sparsity__schedule=str(path))
    result = train(config, tiny_wan, tmp_path / "run", dataset=make_clips(4))
    video = VideoOptions(model=str(result), device="cpu")
    asked = video.request(prompt="a red circle", seed=0, sparse_algo=None)
    assert (asked.sparse_algo, asked.schedule) == ("nabla-0.4", schedule)
    assert video.request(prompt="", seed=0, sparse_algo="nabla-0.5").schedule is None

    def stop(pipeline, request, algos, **_):
        assert request.schedule == schedule and algos == ["nabla-0.4"]
        raise KeyboardInterrupt

    monkeypatch.setattr("nabla_attn.evaluation.compare.compare", stop)
    command = ["compare", "--model", str(result), "--device", "cpu", "--prompt", "a red circle"]
    small = ["--frames", "5", "--height", "32", "--width", "32"]
    out = ["--output", str(tmp_path / "out")]
    asked = CliRunner().invoke(app, [*command, *small, *out])
    assert asked.exit_code == 130, asked.output
    # Trained again without one, the result has none.
    again = train(small_config(steps=1), result, tmp_path / "again", dataset=make_clips(4))
    assert VideoOptions(model=str(again)).defaults.schedule is None


def test_a_model_in_a_download_cache_gives_whole_results(tiny_wan, tmp_path):
    # Such a cache holds relative links to files elsewhere.
    (tmp_path / "blobs").mkdir()
    model = tmp_path / "snapshots" / "model"
    shutil.copytree(tiny_wan, model)
    for number, path in enumerate(sorted(p for p in model.rglob("*") if p.is_file())):
        path.rename(tmp_path / "blobs" / str(number))
        up = "../" * len(path.relative_to(tmp_path).parts[:-1])
        path.symlink_to(f"{up}blobs/{number}")
    result = train(small_config(steps=1), model, tmp_path / "run", dataset=make_clips(4))
    found = [path for path in result.rglob("*") if not path.is_dir()]
    assert found and all(path.is_file() and not path.is_symlink() for path in found)


@pytest.mark.parametrize("place", [".", "runs/finetune"])
def test_an_output_inside_the_model_is_refused_before_training(
    tiny_wan, tmp_path, monkeypatch, place
):
    model = shutil.copytree(tiny_wan, tmp_path / "model")
    before = sorted(model.rglob("*"))
    monkeypatch.chdir(model)
    said = pytest.raises(ValueError, match=r"inside the model .*another --output")
    with said:
        train(small_config(steps=1), model, Path(place), dataset=make_clips(4))
    config = read_config("finetune", ["model=.", "data.folder=none"])
    for run in (run_job, check_job):
        with said:
            run(config, Path(place), MovingShapes())
    assert sorted(model.rglob("*")) == before


def test_adapters_may_be_saved_inside_the_model(tiny_wan, tmp_path):
    model = shutil.copytree(tiny_wan, tmp_path / "model")
    config = small_config(steps=1, lora__rank=2)
    result = train(config, model, model / "run", dataset=make_clips(4))
    assert (result / "pytorch_lora_weights.safetensors").is_file()


def test_lora_trains_adapters_alone_and_diffusers_reads_them(tiny_wan, tmp_path):
    from diffusers import WanPipeline

    parts = load_parts(tiny_wan)
    config = small_config("distill", steps=3, lora__rank=2, lora__alpha=6.0, optim__lr=1e-2)
    run = prepare(config, parts, make_clips(4))
    start = load_file(tiny_wan / WEIGHTS)
    result = train(config, tiny_wan, tmp_path, dataset=make_clips(4))
    assert len(run.trained()) == 2 * 2 * 2 * 4
    assert {p.stat().st_ino for p in tiny_wan.glob(WEIGHTS)}
    after = load_file(tiny_wan / WEIGHTS)
    assert all(torch.equal(start[name], after[name]) for name in start)
    pipeline = WanPipeline.from_pretrained(tiny_wan)
    pipeline.load_lora_weights(result)
    (settings,) = pipeline.transformer.peft_config.values()
    assert (settings.r, settings.lora_alpha) == (2, 6.0)
    loaded = {name: p for name, p in pipeline.transformer.named_parameters() if "lora_B" in name}
    assert len(loaded) == 16 and all(p.abs().max() > 0 for p in loaded.values())


def test_distilling_with_lora_leaves_the_base_bit_for_bit(tiny_wan, tmp_path):
    from nabla_attn.training.trainer import Trainer

    parts = load_parts(tiny_wan)
    config = small_config("distill", steps=4, lora__rank=2, sparsity__algorithm="nabla-0.3")
    run = prepare(config, parts, make_clips(4))
    before = {n: p.detach().clone() for n, p in run.bare.named_parameters() if "lora" not in n}
    Trainer(run, tmp_path).fit()
    after = dict(run.bare.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert any(p.abs().max() > 0 for name, p in after.items() if "lora_B" in name)


def test_the_lora_teacher_is_the_dense_model_without_a_copy(tiny_wan):
    parts, plain = load_parts(tiny_wan), load_parts(tiny_wan).transformer.eval()
    config = small_config("distill", lora__rank=2, sparsity__algorithm="nabla-0.3")
    run = prepare(config, parts, make_clips(4))
    for name, parameter in run.bare.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    batch, _ = run.loader.largest()
    arguments = run.family.inputs(batch["latents"], torch.tensor([500.0]), batch["conditions"])
    with torch.no_grad():
        student = run.bare(**arguments, return_dict=False)[0]
        with run.objective.teacher() as teacher:
            assert teacher is run.bare
            taught = teacher(**arguments, return_dict=False)[0]
        again = run.bare(**arguments, return_dict=False)[0]
        expected = plain(**arguments, return_dict=False)[0]
    assert torch.equal(taught, expected) and torch.equal(student, again)
    assert not torch.equal(student, taught)


@pytest.mark.parametrize(
    "values",
    [
        {"gradient_checkpointing": True},
        {"precision": "bfloat16"},
        {"recipe": "distill", "precision": "bfloat16", "gradient_checkpointing": True},
        {"recipe": "distill", "objective__layer_weight": 1.0, "objective__data_weight": 0.1},
        {"recipe": "distill", "objective__guidance": 3.0, "lora__rank": 2, "data__pack": 6},
        {"recipe": "distill", "objective__guidance": 3.0, "sparsity__algorithm": "dense"},
        {"lora__rank": 2, "gradient_checkpointing": True},
        {"sparsity__algorithm": "dense"},
        {"sparsity__algorithm": "topk-0.3_sta-1-1-1", "sparsity__ramp": 2},
        {"sparsity__dense_share": 0.5, "objective__times": "logit-normal"},
        {"recipe": "distill", "sparsity__thresholds": (0.3, 0.8), "sparsity__ramp": 2},
    ],
)
def test_ways_to_train_run_and_stay_finite(tiny_wan, tmp_path, values):
    entries = []
    config = small_config(steps=2, **values)
    train(config, tiny_wan, tmp_path, dataset=make_clips(5, odd=True), on_log=entries.append)
    assert [entry.step for entry in entries] == [1, 2]
    assert entries[-1].numbers["skipped"] == 0


def test_checkpointing_gives_the_same_losses(tiny_wan, tmp_path):
    def losses(name, **values):
        entries = []
        clips = make_clips(4)
        train(
            small_config(steps=3, **values),
            tiny_wan,
            tmp_path / name,
            dataset=clips,
            on_log=entries.append,
        )
        return [entry.numbers["loss"] for entry in entries]

    assert losses("with", gradient_checkpointing=True) == pytest.approx(losses("without"), rel=1e-6)


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses(tiny_wan, tmp_path):
    def losses(name, **values):
        entries = []
        train(
            small_config(steps=3, **values),
            tiny_wan,
            tmp_path / name,
            dataset=make_clips(4),
            on_log=entries.append,
        )
        return [entry.numbers["loss"] for entry in entries]

    assert losses("with", compile=True) == pytest.approx(losses("without"), rel=1e-4)
