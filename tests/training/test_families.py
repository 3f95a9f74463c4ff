import inspect
import random

import numpy as np
import pytest
import torch
from PIL import Image
from tests.training import tiny_pipelines as tiny

from nabla_attn.generation.pipeline import load_pipeline
from nabla_attn.training.data import collate
from nabla_attn.training.encoders import encode_caption, encode_first_frame, encode_video
from nabla_attn.training.families import check_size, family_of, size_steps
from nabla_attn.training.objective import predict

CAPTION = "a small red circle moving right"


@pytest.fixture(params=["wan", *tiny.KINDS])
def kind(request):
    return request.param


@pytest.fixture
def pipeline(kind, tiny_wan):
    if kind == "wan":
        return load_pipeline(tiny_wan, device="cpu", dtype="float32")
    return getattr(tiny, kind)()


def size_of(kind):
    return dict(zip(("frames", "height", "width"), tiny.size_of(kind), strict=True))


def noise(frames, height, width):
    return np.random.default_rng(0).integers(0, 255, (frames, height, width, 3), np.uint8)


def run_pipeline(pipeline, latents, size, image):
    """What the transformer is told and says at the first step, and what the VAE would decode."""
    seen = {}

    def keep(module, args, kwargs, output):
        if not seen:
            seen.update(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
            seen["output"] = output[0] if isinstance(output, tuple) else output.sample

    def decode(latents, *args, **kwargs):
        seen["decoded"] = latents
        raise StopIteration

    family = family_of(pipeline)
    hooks = [
        pipeline.transformer.register_forward_hook(keep, with_kwargs=True),
        pipeline.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, **family.fixed}), with_kwargs=True
        ),
    ]
    # The latents stay what they are, so that they are what is decoded.
    pipeline.scheduler.step = lambda predicted, t, sample, **_: (sample,)
    pipeline.vae.decode = decode
    # Kandinsky 5 brightens the first frame like the next ones, after the last step.
    pipeline.normalize_first_frame = lambda latents: latents
    pipeline.set_progress_bar_config(disable=True)
    more = {} if hasattr(pipeline, "guider") else {"guidance_scale": 1.0, **family.unguided}
    if family.takes_image:
        # Some pipelines draw the first frame's latents.
        more |= {"image": Image.fromarray(image), "generator": torch.Generator().manual_seed(0)}
    with pytest.raises(StopIteration):
        pipeline(
            prompt=CAPTION,
            height=size["height"],
            width=size["width"],
            num_frames=size["frames"],
            num_inference_steps=2,
            latents=latents.clone(),
            **more,
        )
    for hook in hooks:
        hook.remove()
    return seen


def test_latents_and_conditions_are_those_of_generation(kind, pipeline):
    family, size = family_of(pipeline), size_of(kind)
    video = noise(**size)
    latents = encode_video(pipeline, video)
    conditions = encode_caption(pipeline, CAPTION, **size) | encode_first_frame(pipeline, video)
    item = {"latents": latents, "conditions": conditions, "empty": conditions, "caption": CAPTION}
    batch = collate([item, item], 0.0, random.Random(0))
    start = latents[None]
    if kind == "kandinsky5_i2v":
        # It adds these channels to noise of its own, not to latents that it is given.
        start = torch.cat([start, conditions["extra_latents"][None]], -1)
    if kind == "ltx2_i2v":
        start = latents.T.unflatten(1, (-1, size["height"] // 8, size["width"] // 8))[None]
    seen = run_pipeline(pipeline, start, size, video[0])

    pixels = torch.from_numpy(video).permute(3, 0, 1, 2)[None] / 127.5 - 1
    with torch.no_grad():
        wanted = pipeline.vae.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(seen["decoded"], wanted, rtol=1e-4, atol=1e-4)

    timestep = seen["timestep"].max().expand(2)
    with torch.no_grad():
        arguments = family.inputs(batch["latents"], timestep, batch["conditions"])
        predicted = predict(pipeline.transformer, arguments)
    assert predicted.shape == batch["latents"].shape
    for sample in predicted:
        torch.testing.assert_close(sample[None], seen["output"], rtol=1e-4, atol=1e-4)


def test_the_noise_convention_is_the_schedulers(kind, pipeline):
    family = family_of(pipeline)
    if family.prediction != "flow":
        assert pipeline.scheduler.config.prediction_type == family.prediction
        return
    latents, noise = torch.randn(1, 4), torch.randn(1, 4)
    scheduler = pipeline.scheduler
    mu = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(3, **mu)
    sigma = scheduler.sigmas[1:2]
    level = 1 - sigma if family.is_reversed else sigma
    noisy = (1 - level) * latents + level * noise
    told = family.timestep(level)
    torch.testing.assert_close(told, scheduler.timesteps[1:2].float(), rtol=0, atol=1.0)
    # UniPC looks back at earlier steps.
    if "UniPC" not in type(scheduler).__name__:
        scheduler._step_index = 1
        target = family.flow_target(latents, noise)
        moved = scheduler.step(target, scheduler.timesteps[1], noisy, return_dict=False)[0]
        after = scheduler.sigmas[2]
        level = 1 - after if family.is_reversed else after
        torch.testing.assert_close(moved, (1 - level) * latents + level * noise)


def test_the_empty_caption_differs_and_sizes_matter_where_they_should(kind, pipeline):
    size = size_of(kind)
    some, none = (encode_caption(pipeline, text, **size) for text in (CAPTION, ""))
    assert some.keys() == none.keys()
    assert any(
        some[name].shape != none[name].shape or not torch.equal(some[name], none[name])
        for name in some
    )
    again = encode_caption(pipeline, CAPTION, **size)
    assert all(torch.equal(some[name], again[name]) for name in some)


def test_recording_leaves_no_trace(kind, pipeline):
    state = torch.get_rng_state()
    before = dict(getattr(pipeline, "_progress_bar_config", {}))
    encode_caption(pipeline, CAPTION, **size_of(kind))
    assert not pipeline.transformer._forward_pre_hooks
    assert pipeline._progress_bar_config == before
    assert torch.equal(torch.get_rng_state(), state)


def test_only_the_first_frame_makes_the_conditions_by_image():
    pipeline, size = tiny.wan_i2v(), size_of("wan_i2v")
    video = noise(**size)
    other = video.copy()
    other[0] = 255 - other[0]
    later = video.copy()
    later[1:] = 0
    first, changed, same = (encode_first_frame(pipeline, x) for x in (video, other, later))
    assert first.keys() == {"extra_latents", "encoder_hidden_states_image"}
    assert not first.keys() & encode_caption(pipeline, CAPTION, **size).keys()
    for name, value in first.items():
        assert torch.equal(value, same[name]) and not torch.equal(value, changed[name])
    assert encode_first_frame(tiny.skyreels(), video) == {}


@pytest.mark.parametrize("kind", ["wan22_i2v", "ltx_i2v", "kandinsky5_i2v"])
def test_the_first_frame_stays_as_it_is_and_its_tokens_are_told_so(kind):
    pipeline, size = getattr(tiny, kind)(), size_of(kind)
    family = family_of(pipeline)
    conditions = encode_caption(pipeline, CAPTION, **size)
    latents = encode_video(pipeline, noise(**size))
    clean = conditions["clean"].expand_as(latents).select(family.channel_axis - 1, 0)
    told = conditions.get("num_frames", torch.tensor(2))
    # Frames come first, in the order of tokens too.
    by_frame = clean.reshape(int(told), -1)
    assert by_frame[0].all() and not by_frame[1:].any() and len(by_frame) > 1
    inputs = family.inputs(
        latents[None], torch.tensor([500.0]), {k: v[None] for k, v in conditions.items()}
    )
    if family.has_token_times:
        times = inputs["timestep"].view(len(by_frame), -1)
        assert not times[0].any() and (times[1:] == 500).all()
    else:
        assert inputs["timestep"].tolist() == [500]
    with pytest.raises(ValueError, match="1 frames do not fit this model"):
        encode_video(pipeline, noise(1, size["height"], size["width"]))


def test_channels_that_the_pipeline_fills_with_zeros():
    pipeline = tiny.kandinsky5(visual_cond=True)
    size = size_of("kandinsky5")
    conditions = encode_caption(pipeline, CAPTION, **size)
    assert conditions["extra_channels"] == 5
    latents = encode_video(pipeline, noise(**size))[None]
    batch = {name: value[None] for name, value in conditions.items()}
    arguments = family_of(pipeline).inputs(latents, torch.tensor([500.0]), batch)
    assert arguments["hidden_states"].shape[-1] == 9
    assert torch.equal(arguments["hidden_states"][..., :4], latents)
    with torch.no_grad():
        out = predict(pipeline.transformer, arguments)
    assert out.shape == latents.shape


def test_sizes():
    pipeline = tiny.cogvideox15()
    assert size_steps(pipeline) == (5, 8, 16)
    assert size_steps(tiny.mochi()) == (1, 6, 16)
    for size, words in [
        ((9, 32, 32), r"9 frames do not fit this model: it takes 8n\+5"),
        ((5, 40, 32), "height 40 does not fit this model: it takes multiples of 16"),
        ((5, 32, 0), "width 0"),
    ]:
        with pytest.raises(ValueError, match=words):
            check_size(pipeline, *size)
        with pytest.raises(ValueError, match=words):
            frames, height, width = size
            encode_caption(pipeline, "", frames=frames, height=height, width=width)


def test_pipelines_that_cannot_be_trained():
    pipeline = tiny.ltx()
    for part, meaning in {"vae": "VAE", "text_encoder": "text encoder"}.items():
        with pytest.raises(ValueError, match=f"this LTXPipeline has no {meaning}"):
            family_of(tiny.without(pipeline, **{part: None}))
    from diffusers import AllegroPipeline

    with pytest.raises(ValueError, match=r"AllegroPipeline cannot be trained.*WanPipeline"):
        family_of(AllegroPipeline(None, None, None, None, None))
