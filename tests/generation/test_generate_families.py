"""`nabla generate` of every family whose whole tiny pipeline the tests have."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from tests.training import tiny_pipelines

from nabla_attn.generation.generate import generate, sample, warm_up
from nabla_attn.generation.pipeline import load_pipeline
from nabla_attn.generation.request import GenerationRequest, check_request, video_tokens
from nabla_attn.models.plan import plan_of
from nabla_attn.sizes import fits_frames, vae_strides

# Name of the pipeline, frames, height, width, and the tokens that its transformer sees.
FAMILIES = [
    ("ltx", 9, 64, 96, (3, 16, 24)),
    ("cogvideox", 9, 32, 48, (3, 2, 3)),
    ("cogvideox15", 9, 32, 48, (2, 2, 3)),
    ("hunyuan", 9, 64, 80, (3, 4, 5)),
    ("kandinsky5", 5, 64, 96, (2, 4, 6)),
    ("mochi", 7, 64, 80, (2, 4, 5)),
]


def request(frames, height, width):
    return GenerationRequest(
        "a red circle", height=height, width=width, frames=frames, steps=2, sparse_algo="nabla-0.5"
    )


@pytest.mark.parametrize(("name", "frames", "height", "width", "tokens"), FAMILIES)
def test_a_request_makes_its_video(name, frames, height, width, tokens):
    pipeline, seen = getattr(tiny_pipelines, name)(), []
    wanted = request(frames, height, width)

    def look(handle):
        layer = handle.models[0][1].layers[0]
        layer.observer = lambda layer, *call: seen.append(layer)

    video, record = generate(pipeline, wanted, on_apply=look)
    assert video.shape == (frames, height, width, 3)
    assert tuple(record.numbers["tokens"].values()) == tokens == video_tokens(pipeline, wanted)
    grid = plan_of(seen[0].key).grid
    assert (grid.frames, grid.height, grid.width) == tokens
    pipeline.transformer.register_forward_hook(lambda *call: seen.append(call))
    seen.clear()
    warm_up(pipeline, replace(wanted, guidance=1.0))
    assert len(seen) == 1
    step, _ = vae_strides(pipeline)
    with pytest.raises(ValueError, match=f"takes {step}n\\+1. Nearest: {frames} or"):
        check_request(pipeline, replace(wanted, frames=frames + 1))


@pytest.mark.parametrize(("name", "frames", "height", "width", "tokens"), FAMILIES[:2])
def test_a_directory_in_bfloat16(name, frames, height, width, tokens, tmp_path):
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


def test_a_pipeline_that_cannot_be_asked_is_named():
    class GuiderPipeline:
        def __call__(self, prompt, negative_prompt, height, width, num_frames):
            raise AssertionError

        def set_progress_bar_config(self, **options):
            pass

    with pytest.raises(ValueError, match="GuiderPipeline takes no generator, guidance_scale"):
        sample(GuiderPipeline(), request(5, 64, 64))
    with pytest.raises(ValueError, match="none of vae_scale_factor_temporal"):
        vae_strides(GuiderPipeline())
