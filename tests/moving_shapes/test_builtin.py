import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from nabla_attn.generation.generate import generate
from nabla_attn.generation.pipeline import load_pipeline
from nabla_attn.generation.request import GenerationRequest, ModelDefaults
from nabla_attn.moving_shapes import sample_scene
from nabla_attn.moving_shapes.loop import Stage, run_stage, step_at
from nabla_attn.moving_shapes.recipe import (
    MuonConfig,
    TransformerPhase,
    VaeConfig,
    VaePhase,
    builtin,
)
from nabla_attn.moving_shapes.train import train_builtin
from nabla_attn.moving_shapes.transformer import (
    CaptionEncoder,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    flow_loss,
    is_hidden_matrix,
    is_image_step,
)
from nabla_attn.moving_shapes.vae import LatentSet
from nabla_attn.record import RunRecord

OPTIM = MuonConfig(muon_lr=0.02, adamw_lr=2e-3, warmup=2, average=0.5)


def phase(name, size=16, **settings):
    return TransformerPhase(
        name, size=size, frames=5, steps=2, batch=2, clips=3, shift=3.0, optim=OPTIM, **settings
    )


def tiny_recipe():
    """Every kind of stage, two steps each."""
    return dataclasses.replace(
        builtin(),
        vae=VaeConfig((VaePhase(steps=2, batch=1, frames=5, size=16, largest=32),)),
        phases=(
            phase("images", image_share=1.0, padding=(0.0, 0.5)),
            phase("sparse", thresholds=(0.3, 0.8), dense_share=0.0, image_share=0.5, images=4),
            phase("places", algorithm="topk-0.5_tail-first", dense_share=0.0, place_weight=0.2),
        ),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    seen = []
    pipeline = train_builtin(tiny_recipe(), folder, seen.append)
    return folder, pipeline, seen


def test_every_stage_is_run_and_recorded(run):
    folder, _, seen = run
    record = RunRecord.load(folder / "training.json")
    stages = ["vae", "images", "sparse", "places"]
    assert [stage["stage"] for stage in record.numbers["stages"]] == stages
    assert record.config == json.loads(json.dumps(dataclasses.asdict(tiny_recipe())))
    assert {p.stage for p in seen} == {*stages, "encode-5x16", "encode-1x16"}


def test_the_result_is_a_pipeline_that_generates(run):
    _, directory, _ = run
    assert ModelDefaults.load(directory).frames == builtin().defaults.frames
    pipeline = load_pipeline(directory, device="cpu", dtype="float32")
    request = GenerationRequest(
        "a red circle moving right", height=32, width=48, frames=5, steps=2, guidance=2.0
    )
    video, _ = generate(pipeline, request)
    assert video.shape == (5, 32, 48, 3)


def test_the_result_does_not_say_where_it_was_made(run):
    folder, directory, _ = run
    texts = [path.read_text() for path in directory.rglob("*.json")]
    assert len(texts) > 5 and not any(str(folder) in text for text in texts)


def test_a_finished_run_is_not_repeated(run):
    folder, pipeline, _ = run
    again = train_builtin(tiny_recipe(), folder, lambda progress: pytest.fail("trained again"))
    assert again == pipeline


def test_a_lost_stage_is_made_again_the_same(run, tmp_path):
    from safetensors.torch import load_file

    folder, pipeline, _ = run
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for name in ("sparse", "places", "pipeline"):
        shutil.rmtree(copy / name)
    for name in ("sparse", "places"):
        (copy / f"{name}.checkpoint").unlink()
    train_builtin(tiny_recipe(), copy)
    name = "transformer/diffusion_pytorch_model.safetensors"
    first, second = load_file(pipeline / name), load_file(copy / "pipeline" / name)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_killed_as_soon_as_the_pipeline_is_there_it_is_whole(run, tmp_path, monkeypatch):
    folder, pipeline, _ = run
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("pipeline"))
    real = Path.replace

    def replace_and_die(path, target):
        real(path, target)
        if Path(target) == copy / "pipeline":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", replace_and_die)
        train_builtin(tiny_recipe(), copy)
    again = train_builtin(tiny_recipe(), copy)
    assert ModelDefaults.load(again) == ModelDefaults.load(pipeline)


def test_another_recipe_in_the_same_folder_is_refused(run):
    folder, _, _ = run
    with pytest.raises(ValueError, match="another recipe"):
        train_builtin(dataclasses.replace(tiny_recipe(), seed=1), folder)


@pytest.mark.slow
def test_the_transformer_learns_a_few_clips(tmp_path):
    torch.manual_seed(0)
    pattern = torch.randn(4, 16, 1, 1, 1).expand(-1, -1, 2, 4, 4)
    data = LatentSet(pattern.half(), [sample_scene(index) for index in range(4)])
    text = CaptionEncoder(build_tokenizer(), build_text_encoder(0), num_tokens=14)
    model = build_transformer(0)
    one = dataclasses.replace(phase("learn"), batch=8, shift=1.0)
    record = run_stage(
        Stage(
            name="learn",
            folder=tmp_path,
            module=model,
            loss_at=lambda step: flow_loss(model, data, text, one, step),
            is_hidden=is_hidden_matrix,
            optim=OPTIM,
            steps=30,
            seed=0,
        )
    )
    assert record["losses"][-1] < 0.6 * record["losses"][0]


def test_image_steps_have_their_own_images_and_noise():
    calls = []

    class Listener(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, latents, timestep, encoder_hidden_states, return_dict):
            calls.append((list(latents.shape), float(timestep.mean())))
            return (self.weight * latents,)

    clips, images = (
        LatentSet(torch.zeros(2, 16, frames, 4, 4).half(), [sample_scene(0), sample_scene(1)])
        for frames in (2, 1)
    )
    text = CaptionEncoder(build_tokenizer(), build_text_encoder(0), num_tokens=14)
    mixed = dataclasses.replace(
        phase("mixed", image_share=0.5, images=2, image_shift=0.01), batch=3, shift=100.0
    )
    for number in (0, 1):
        flow_loss(Listener(), clips, text, mixed, step_at(0, "mixed", number, 2), images=images)
    assert [shape for shape, _ in calls] == [[3, 16, 2, 4, 4], [6, 16, 1, 4, 4]]
    assert calls[0][1] > 900 and calls[1][1] < 100


@pytest.mark.parametrize(("share", "images"), [(0.0, 0), (0.25, 25), (0.5, 50), (1.0, 100)])
def test_image_steps_are_spread_evenly(share, images):
    mixed = phase("mixed", image_share=share)
    steps = [is_image_step(mixed, number) for number in range(100)]
    assert sum(steps) == images
    assert abs(sum(steps[:50]) - images / 2) <= 1
