import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from nabla_attn.generation.generate import generate
from nabla_attn.generation.pipeline import load_pipeline
from nabla_attn.generation.request import GenerationRequest, ModelDefaults
from nabla_attn.moving_shapes import corrections, sample_scene
from nabla_attn.moving_shapes.loop import Stage, run_stage, step_at
from nabla_attn.moving_shapes.recipe import (
    CorrectionPhase,
    MuonConfig,
    TransformerPhase,
    VaeConfig,
    VaePhase,
    builtin,
)
from nabla_attn.moving_shapes.scene import (
    HELD_OUT,
    Scene,
    Shape,
    parse_caption,
    place_shape,
    render,
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


CORRECTION = CorrectionPhase(
    "corrected",
    size=64,
    frames=5,
    videos=2,
    twins=1,
    steps=2,
    batch=2,
    shift=3.0,
    optim=OPTIM,
    algorithms=("topk-0.5_tail-first",),
    draw_steps=(1,),
    guided_share=0.5,
)


def tiny_recipe():
    """Every kind of stage, two steps each."""
    return dataclasses.replace(
        builtin(),
        vae=VaeConfig((VaePhase(steps=2, batch=1, frames=5, size=16, largest=32),)),
        phases=(
            phase("images", image_share=1.0, padding=(0.0, 0.5)),
            phase("sparse", thresholds=(0.3, 0.8), dense_share=0.0, image_share=0.5, images=4),
            CORRECTION,
        ),
    )


@pytest.fixture(scope="module", autouse=True)
def ideals():
    """An untrained model draws nothing that could be corrected."""

    def some_ideal(video, words):
        shape = words.shapes[0]
        placed = place_shape(random.Random(0), shape.colour, shape.kind, shape.direction)
        return render(Scene((placed,), words.background or "black"), *video.shape[:3])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corrections, "nearest_ideal", some_ideal)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    seen = []
    pipeline = train_builtin(tiny_recipe(), folder, seen.append)
    return folder, pipeline, seen


def test_every_stage_is_run_and_recorded(run):
    folder, _, seen = run
    record = RunRecord.load(folder / "training.json")
    stages = ["vae", "images", "sparse", "corrected"]
    assert [stage["stage"] for stage in record.numbers["stages"]] == stages
    assert record.config == json.loads(json.dumps(dataclasses.asdict(tiny_recipe())))
    assert {p.stage for p in seen} == {*stages, "encode-5x16", "encode-1x16", "draw-corrected"}


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
    for name in ("sparse", "corrected", "corrected-drawn", "pipeline"):
        shutil.rmtree(copy / name)
    for name in ("sparse", "corrected"):
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


def test_corrections_are_drawn_once_and_show_no_held_out_combination(run, monkeypatch):
    folder, _, _ = run
    monkeypatch.setattr(corrections, "_draw_one", lambda *_: pytest.fail("drawn again"))
    kept = corrections.draw_corrections(None, CORRECTION, folder / "corrected-drawn", 0)
    assert 2 <= len(kept) <= 4
    for each in kept:
        assert each.drawn.shape == each.ideal.shape == (16, 2, 8, 8)
        assert each.near.shape == (2, 8, 8) and each.near.dtype == torch.bool
        (shape,) = parse_caption(each.caption).shapes
        assert (shape.colour, shape.kind, shape.direction) not in HELD_OUT


def test_a_model_that_draws_nothing_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(corrections, "_draw_one", lambda *_: [])
    with pytest.raises(ValueError, match="none of 2 videos shows"):
        corrections.draw_corrections(None, CORRECTION, tmp_path, 0)


def test_tokens_near_a_shape_are_those_around_the_drawn_and_the_ideal_one():
    scenes = [
        Scene((Shape("red", "square", "right", "small", x, 0.5),), "black") for x in (0.2, 0.5)
    ]
    near = corrections._near(*(render(scene, 9, 128, 128) for scene in scenes))
    assert near.shape == (3, 16, 16)
    # Both are 36 pixels wide and high; the second ends at x = 0.5 + 0.4 + 0.14.
    assert near[0, 8, 1:10].all() and not near[0, 8, 12:].any() and near[2, 8, 5:].all()
    assert not near[:, :4].any() and not near[:, 12:].any()


class Known(torch.nn.Module):
    """Predicts the velocity that leads to a known video."""

    def __init__(self, ideal):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.ideal, self.levels = ideal, []

    def forward(self, noisy, timestep, encoder_hidden_states, return_dict):
        level = timestep / 1000
        self.levels.append(float(level))
        return ((noisy - self.ideal) / level + self.weight,)


def test_the_target_of_a_correction_is_the_ideal_video():
    drawn, ideal = torch.randn(2, 16, 4, 8, 8).half()
    near = torch.zeros(4, 8, 8, dtype=torch.bool)
    known = Known(ideal[None].float())
    text = CaptionEncoder(build_tokenizer(), build_text_encoder(0), num_tokens=14)
    dense = dataclasses.replace(
        CORRECTION, algorithms=("dense",), plain_share=0.0, guided_share=0.0
    )
    pair = corrections.Correction(drawn, ideal, near, "a red circle moving right")
    loss = corrections.CorrectionLoss(known, None, [pair], text, dense)
    for number in range(20):
        assert loss(step_at(0, "corrected", number, 20)) < 1e-6
    assert min(known.levels) >= 0.5 and len(set(known.levels)) > 4


def test_the_target_without_guidance_is_what_the_teacher_predicts_with_it():
    class Teacher(torch.nn.Module):
        def forward(self, noisy, timestep, encoder_hidden_states, return_dict):
            return (noisy + (1.0 if encoder_hidden_states[0, 1].any() else 0.5),)

    class Student(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, noisy, **_):
            return (noisy + self.weight,)

    pair = corrections.Correction(
        *torch.randn(2, 16, 4, 8, 8).half(),
        torch.zeros(4, 8, 8, dtype=torch.bool),
        "a red circle moving right",
    )
    text = CaptionEncoder(build_tokenizer(), build_text_encoder(0), num_tokens=14)
    guided = dataclasses.replace(CORRECTION, algorithms=("dense",), guided_share=1.0, guidance=3.0)
    loss = corrections.CorrectionLoss(Student(), Teacher(), [pair], text, guided)
    # 0.5 + 3 (1 - 0.5) = 2
    assert loss(step_at(0, "guided", 0, 1)) < 1e-4


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
