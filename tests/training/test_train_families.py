"""The loop knows no family: the same few lines train all of them."""

import math
from pathlib import Path

import pytest
import torch
from tests.training import tiny_pipelines as tiny
from tests.training.clips import small_config
from typer.testing import CliRunner

from nabla_attn.cli import app
from nabla_attn.generation.lora import load_lora
from nabla_attn.moving_shapes.dataset import WorldSet
from nabla_attn.training.adapters import add_lora
from nabla_attn.training.check import probe
from nabla_attn.training.model import Parts
from nabla_attn.training.objective import predict
from nabla_attn.training.sections import LoraConfig
from nabla_attn.training.setup import prepare
from nabla_attn.training.train import finish
from nabla_attn.training.trainer import Trainer


def shift_of(kind):
    return {} if "cogvideox" in kind else {"objective__shift": 2}


def parts_of(pipeline, folder):
    model, scheduler = pipeline.transformer, pipeline.scheduler
    return Parts(folder, "transformer", model, scheduler, type(pipeline), pipeline.config)


def prepare_family(kind, folder, recipe="finetune", *, is_saved=False, **values):
    """A run over two clips, one of them held out, and what it will log."""
    pipeline = getattr(tiny, kind)()
    frames, height, width = tiny.size_of(kind)
    clips = WorldSet(pipeline, clips=2, frames=frames, height=height, width=width)
    values = {"sparsity__algorithm": "nabla-0.5", "data__validation": 1, **shift_of(kind)} | values
    # Stand-ins for large text encoders cannot be loaded, so the parts are handed over.
    if is_saved:
        pipeline.save_pretrained(folder / "model")
    run = prepare(small_config(recipe, **values), parts_of(pipeline, folder / "model"), clips)
    probe(run)
    entries = []
    return run, Trainer(run, folder / "run", on_log=entries.append), entries


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_family_trains_and_its_weights_load(kind, tmp_path):
    run, trainer, entries = prepare_family(kind, tmp_path, is_saved=True, steps=2)
    trainer.fit()
    result = finish(run, trainer)
    assert len(entries) == 2 and entries[-1].numbers["skipped"] == 0
    assert entries[-1].layers and entries[-1].numbers["validation"] >= 0
    loaded = type(run.bare).from_pretrained(result / "transformer")
    trained = dict(run.bare.named_parameters())
    assert all(torch.equal(p, trained[name]) for name, p in loaded.named_parameters())


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_family_is_distilled(kind, tmp_path):
    run, trainer, entries = prepare_family(kind, tmp_path, "distill", steps=1)
    before = [p.detach().clone() for p in run.trained()]
    trainer.fit()
    assert len(entries) == 1 and entries[0].numbers["skipped"] == 0
    assert entries[0].layers and entries[0].numbers["validation"] >= 0
    assert any(not torch.equal(a, b) for a, b in zip(before, run.trained(), strict=True))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_family_trains_in_bfloat16(kind, tmp_path):
    run, trainer, entries = prepare_family(kind, tmp_path, steps=1, precision="bfloat16")
    before = [p.detach().clone() for p in run.trained()]
    trainer.fit()
    (numbers,) = (entry.numbers for entry in entries)
    assert numbers["skipped"] == 0 and math.isfinite(numbers["validation"])
    assert entries[0].layers
    # The weights stay float32, and they moved.
    assert {p.dtype for p in run.trained()} == {torch.float32}
    pairs = zip(before, run.trained(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters")
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_adapters_of_a_family_train_and_load(kind, tmp_path):
    pipeline = getattr(tiny, kind)()
    frames, height, width = tiny.size_of(kind)
    clips = WorldSet(pipeline, clips=2, frames=frames, height=height, width=width)
    config = small_config(
        steps=1, lora__rank=2, optim__lr=1e-2, data__validation=0, **shift_of(kind)
    )
    model = pipeline.transformer
    parts = parts_of(pipeline, tmp_path / "model")
    if not hasattr(model, "add_adapter"):
        with pytest.raises(ValueError, match=f"{type(model).__name__} takes no adapters"):
            prepare(config, parts, clips)
        return
    run = prepare(config, parts, clips)
    trainer = Trainer(run, tmp_path / "run")
    trainer.fit()
    result = finish(run, trainer)
    fresh = getattr(tiny, kind)()
    load_lora(fresh, str(result))
    trained = dict(model.named_parameters())
    loaded = {
        name.replace("default_0", "default"): p for name, p in fresh.transformer.named_parameters()
    }
    adapters = {name for name in trained if "lora_" in name}
    assert adapters and all(torch.equal(trained[name], loaded[name]) for name in adapters)
    # diffusers adds zeros for what an image-to-video model has besides.
    others = [p for name, p in loaded.items() if "lora_B" in name and name not in adapters]
    assert not any(p.any() for p in others)
    assert any(trained[name].any() for name in adapters if "lora_B" in name)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("kind", ["ltx2", "ltx2_i2v"])
def test_what_ltx2_has_for_sound_stays_and_is_not_heard(kind, rank):
    pipeline = getattr(tiny, kind)()
    model = pipeline.transformer
    frames, height, width = tiny.size_of(kind)
    clips = WorldSet(pipeline, clips=2, frames=frames, height=height, width=width)
    config = small_config(steps=1, lora__rank=rank, objective__shift=2, data__validation=0)
    run = prepare(config, parts_of(pipeline, Path("model")), clips)
    batch, generator = run.loader.largest()
    run.objective(run.module, batch, generator)["loss"].backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(gradient is not None for gradient in trained.values())
    assert not any("audio" in name for name in trained)
    assert any("attn1.to_q" in name for name in trained)

    conditions = batch["conditions"]
    louder = conditions | {"audio_hidden_states": 9 * conditions["audio_hidden_states"]}
    with torch.no_grad():
        said, said_louder = (
            predict(model, run.family.inputs(batch["latents"], torch.tensor([500.0]), told))
            for told in (conditions, louder)
        )
    assert torch.equal(said, said_louder)


def test_adapter_targets_that_fit_nothing_are_named():
    model = tiny.kandinsky5().transformer
    for targets, words in [
        (("to_query", "to_q"), "no linear layer named to_q. Set lora.targets to ends of names"),
        (("query",), "no linear layer named query"),
    ]:
        with pytest.raises(ValueError, match=words):
            add_lora(model, LoraConfig(rank=2, targets=targets), seed=0)
    add_lora(model, LoraConfig(rank=2, targets=("self_attention.to_query",)), seed=0)
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert names and all("self_attention.to_query" in name for name in names)


@pytest.mark.parametrize(
    ("kind", "rank", "words"),
    [
        ("wan_i2v", 0, " --image FILE."),
        ("wan22_i2v", 0, " --image FILE."),
        ("wan_i2v", 2, "/run/lora --image FILE, or pipeline.load_lora_weights("),
        ("motif", 2, "/run/lora, or pipeline.transformer.load_lora_adapter("),
    ],
)
def test_the_command_says_how_the_result_is_loaded(kind, rank, words, tmp_path):
    getattr(tiny, kind)().save_pretrained(tmp_path / "model")
    settings = f"steps=1 data.folder=world data.clips=2 data.validation=1 lora.rank={rank}".split()
    size = ["data.frames=5", "data.height=32", "data.width=48", "data.batch=1", "objective.shift=2"]
    place = [f"model={tmp_path / 'model'}", "--output", str(tmp_path / "run")]
    run = CliRunner().invoke(
        app, ["train", "finetune", *settings, *size, *place, "watch.prompts=0"]
    )
    assert run.exit_code == 0, run.output
    assert words in run.output.replace("\n", "")
