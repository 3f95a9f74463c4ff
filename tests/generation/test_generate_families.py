"""`nabla generate` of every family whose whole tiny pipeline the tests have."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.models.tiny_models import relative_error
from tests.training import tiny_pipelines

from nabla_attn.generation.call import sample
from nabla_attn.generation.generate import generate, warm_up
from nabla_attn.generation.model_index import find_class, named_parts, read_model_index
from nabla_attn.generation.pipeline import load_pipeline
from nabla_attn.generation.request import (
    GenerationRequest,
    ModelDefaults,
    check_request,
    make_request,
    video_tokens,
)
from nabla_attn.models import replaced
from nabla_attn.sizes import fits_frames, frame_step, vae_strides

# Name of the pipeline, frames, height, width, and the tokens that its transformer sees.
FAMILIES = [
    ("ltx", 9, 64, 96, (3, 16, 24)),
    ("cogvideox", 9, 32, 48, (3, 2, 3)),
    ("cogvideox15", 9, 32, 48, (2, 2, 3)),
    ("hunyuan", 9, 64, 80, (3, 4, 5)),
    ("kandinsky5", 5, 64, 96, (2, 4, 6)),
    ("mochi", 7, 64, 80, (2, 4, 5)),
    ("hunyuan15", 9, 64, 96, (3, 4, 6)),
    ("motif", 9, 64, 80, (3, 4, 5)),
    ("skyreels", 9, 64, 80, (3, 4, 5)),
    ("easyanimate", 9, 64, 80, (3, 4, 5)),
]


def request(frames, height, width):
    return GenerationRequest(
        "a red circle", height=height, width=width, frames=frames, steps=2, sparse_algo="nabla-0.5"
    )


def sample_with(pipeline, wanted):
    """The request's latents."""
    with replaced(pipeline, None if wanted.is_dense else wanted.sparse_algo):
        return sample(pipeline, wanted, output_type="latent")


@pytest.mark.parametrize(("name", "frames", "height", "width", "tokens"), FAMILIES)
def test_a_request_makes_its_video(name, frames, height, width, tokens):
    pipeline, seen = getattr(tiny_pipelines, name)(), []
    wanted = request(frames, height, width)

    def look(handle):
        handle.observe(seen.append)

    video, record = generate(pipeline, wanted, on_apply=look)
    assert video.shape == (frames, height, width, 3)
    assert len(record.numbers["seconds"]["transformer_steps"]) == wanted.steps
    assert tuple(record.numbers["tokens"].values()) == tokens == video_tokens(pipeline, wanted)
    grid = seen[0].layout.grid
    assert (grid.frames, grid.height, grid.width) == tokens
    pipeline.transformer.register_forward_hook(lambda *call: seen.append(call))
    seen.clear()
    warm_up(pipeline, replace(wanted, guidance=1.0))
    assert len(seen) == 1
    step = frame_step(pipeline)
    with pytest.raises(ValueError, match=f"takes {step}n\\+1. Nearest: {frames} or"):
        check_request(pipeline, replace(wanted, frames=frames + 1))


def test_sound_that_is_not_kept_is_named():
    with pytest.warns(UserWarning, match="LTX2Pipeline makes sound too, which is not kept"):
        video, record = generate(tiny_pipelines.ltx2(), request(9, 64, 96))
    assert video.shape == (9, 64, 96, 3)
    assert tuple(record.numbers["tokens"].values()) == (2, 8, 12)
    assert 0 < record.numbers["attention"]["density"] <= 1


@pytest.mark.parametrize("name", ["mochi", "hunyuan15", "motif", "skyreels", "easyanimate"])
def test_threshold_one_is_dense_and_removal_leaves_nothing(name):
    pipeline = getattr(tiny_pipelines, name)()
    frames, height, width = (7, 32, 48) if name == "mochi" else (5, 32, 48)
    wanted = replace(request(frames, height, width), sparse_algo="dense")
    dense, one, sparse, again = (
        sample_with(pipeline, replace(wanted, sparse_algo=algo))
        for algo in ("dense", "nabla-1", "nabla-0.1", "dense")
    )
    assert relative_error(one, dense) < 1e-4 < relative_error(sparse, dense)
    assert torch.equal(again, dense)


@pytest.mark.parametrize(
    ("name", "frames", "height", "width"), [family[:4] for family in FAMILIES[:2]]
)
def test_a_directory_in_bfloat16(name, frames, height, width, tmp_path):
    getattr(tiny_pipelines, name)().save_pretrained(tmp_path)
    pipeline = load_pipeline(tmp_path, device="cpu", dtype="bfloat16")
    video, _ = generate(pipeline, request(frames, height, width))
    assert video.shape == (frames, height, width, 3)


def test_allegro_takes_even_numbers_of_frames():
    class AllegroPipeline:
        vae_scale_factor_temporal, vae_scale_factor_spatial = 4, 8
        transformer = SimpleNamespace(config=SimpleNamespace(patch_size=2))

    pipeline = AllegroPipeline()
    assert [frames for frames in range(85, 93) if fits_frames(pipeline, frames)] == [85, 88, 89, 92]
    assert video_tokens(pipeline, request(88, 720, 1280)) == (22, 45, 80)
    assert video_tokens(pipeline, request(89, 720, 1280)) == (23, 45, 80)


@pytest.mark.parametrize("name", ["hunyuan15", "motif"])
def test_guidance_is_set_on_a_guider(name, tmp_path):
    """These pipelines' calls take no guidance_scale."""
    getattr(tiny_pipelines, name)().save_pretrained(tmp_path)
    own = ModelDefaults.load(tmp_path).guidance
    assert own == {"hunyuan15": 6.0, "motif": 8.0}[name]
    pipeline = load_pipeline(tmp_path, device="cpu")
    guider, scales = pipeline.guider, []
    pipeline.transformer.register_forward_hook(
        lambda *call: scales.append(pipeline.guider.guidance_scale)
    )
    wanted = request(5, 32, 48)
    for scale in (own, 3.0, 1.0):
        generate(pipeline, replace(wanted, guidance=scale))
    assert scales == [own] * 4 + [3.0] * 4 + [1.0] * 2
    assert pipeline.guider is guider
    assert pipeline.scheduler.step.__func__ is type(pipeline.scheduler).step


def test_the_guidance_of_a_directory(tmp_path):
    (tmp_path / "guider").mkdir()
    config = tmp_path / "guider" / "guider_config.json"
    config.write_text('{"guidance_scale": 6.0, "enabled": false}')
    assert ModelDefaults.load(tmp_path).guidance == 1.0
    (tmp_path / "defaults.json").write_text('{"guidance": 4}')
    assert ModelDefaults.load(tmp_path).guidance == 4
    config.write_text("{")
    with pytest.raises(ValueError, match=r"guider_config.json: not valid JSON"):
        ModelDefaults.load(tmp_path)


def test_a_pipeline_that_cannot_be_asked_is_named():
    class OtherPipeline:
        def __call__(self, prompt, negative_prompt, height, width, num_frames):
            raise AssertionError

        def set_progress_bar_config(self, **options):
            pass

    class Guided(OtherPipeline):
        guider = SimpleNamespace(config={"guidance_scales": [10.0, 5.0]})

    with pytest.raises(ValueError, match="OtherPipeline takes no generator, guidance_scale"):
        sample(OtherPipeline(), request(5, 64, 64))
    with pytest.raises(ValueError, match="SimpleNamespace has no guidance_scale"):
        sample(Guided(), request(5, 64, 64))
    Guided.guider = None
    with pytest.raises(ValueError, match="Guided takes no generator, guidance_scale"):
        sample(Guided(), request(5, 64, 64))
    with pytest.raises(
        ValueError,
        match="WanImageToVideoPipeline makes videos from a first",
    ):
        sample(tiny_pipelines.wan_i2v(), request(5, 32, 48))
    with pytest.raises(ValueError, match="none of vae_scale_factor_temporal"):
        vae_strides(OtherPipeline())


@pytest.mark.parametrize("name", [entry[0] for entry in FAMILIES])
def test_every_number_of_frames_that_is_taken_is_made(name):
    pipeline = getattr(tiny_pipelines, name)()
    first = next(entry for entry in FAMILIES if entry[0] == name)
    fitting = [frames for frames in range(1, 26) if fits_frames(pipeline, frames)][1:4]
    for frames in fitting:
        wanted = replace(request(frames, *first[2:4]), steps=1, guidance=1.0, sparse_algo="dense")
        if name == "mochi":
            wanted = replace(wanted, steps=2)
        video, record = generate(pipeline, wanted)
        assert len(video) == frames == record.config["frames"]


def test_the_record_says_what_was_made(monkeypatch):
    pipeline = tiny_pipelines.cogvideox()
    monkeypatch.setattr("nabla_attn.generation.request.fits_frames", lambda *_: True)
    with pytest.warns(UserWarning, match="made 48x32 and 16 frames where 48x32 and 13"):
        video, record = generate(pipeline, request(13, 32, 48))
    assert len(video) == record.config["frames"] == 16


def test_mochi_says_that_it_needs_two_steps():
    with pytest.raises(ValueError, match="Mochi's noise levels need at least 2 steps, got 1"):
        generate(tiny_pipelines.mochi(), replace(request(7, 64, 80), steps=1))


def test_parts_that_one_pipeline_alone_has_are_loaded(tmp_path):
    tiny_pipelines.ltx2().save_pretrained(tmp_path)
    library, name = named_parts(read_model_index(tmp_path))["connectors"]
    assert library == "ltx2"
    found = find_class(library, name, tmp_path)
    assert found.__module__.startswith("diffusers.pipelines.ltx2")
    assert found.from_pretrained(tmp_path / "connectors", local_files_only=True)


def test_the_second_transformer_has_a_guidance_of_its_own(tmp_path):
    (tmp_path / "defaults.json").write_text('{"guidance": 4, "guidance_2": 3}')
    defaults = ModelDefaults.load(tmp_path)
    asked = make_request(defaults, prompt="red")
    assert (asked.guidance, asked.guidance_2) == (4, 3)
    assert asked.to_dict()["guidance_2"] == 3
    typed = make_request(defaults, prompt="red", guidance=2.0)
    assert typed.guidance_2 is None and "guidance_2" not in typed.to_dict()
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "defaults.json").write_text('{"guidance": 1}')
    (lora / "pytorch_lora_weights.safetensors").touch()
    assert ModelDefaults.load(tmp_path, [str(lora)]).guidance_2 is None


def test_the_guidance_of_the_second_transformer_reaches_it(tiny_wan):
    from diffusers import WanPipeline

    parts = load_pipeline(tiny_wan, device="cpu", dtype="float32").components
    parts["transformer_2"] = copy.deepcopy(parts["transformer"])
    pipeline = WanPipeline(**parts | {"boundary_ratio": 0.9})
    wanted = replace(request(5, 32, 48), guidance=2.0)
    alike, _ = generate(pipeline, wanted)
    own, _ = generate(pipeline, replace(wanted, guidance_2=9.0))
    assert pipeline._guidance_scale_2 == 9.0
    assert not np.array_equal(alike, own)
