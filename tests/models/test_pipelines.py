"""Real pipelines of diffusers end to end, and the steps that are counted from them."""

import gc
import weakref

import pytest
import torch
from tests.models.tiny_models import MAX_TEXT, TINY, randn, relative_error

import nabla_attn as na

STEPS = 3
VIDEO = dict(num_inference_steps=STEPS, output_type="latent", num_frames=9, height=176, width=208)


def generator():
    return torch.Generator().manual_seed(0)


def flow_scheduler(**kwargs):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**kwargs)


def wan(**changes):
    from diffusers import UniPCMultistepScheduler, WanPipeline

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    parts = dict(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler)
    pipeline = WanPipeline(**parts | dict(transformer=TINY["wan"].build()) | changes)
    text = dict(
        prompt_embeds=randn(1, MAX_TEXT, 16), negative_prompt_embeds=randn(1, MAX_TEXT, 16) / 2
    )
    return pipeline, VIDEO | text


def wan_i2v():
    from diffusers import AutoencoderKLWan, WanImageToVideoPipeline

    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    transformer = TINY["wan"].build(in_channels=12)
    parts = dict(tokenizer=None, text_encoder=None, vae=vae, scheduler=flow_scheduler())
    pipeline = WanImageToVideoPipeline(
        **parts, image_processor=None, image_encoder=None, transformer=transformer
    )
    text = dict(prompt_embeds=randn(1, MAX_TEXT, 16), negative_prompt_embeds=randn(1, MAX_TEXT, 16))
    return pipeline, VIDEO | text | dict(image=torch.rand(1, 3, 176, 208, generator=generator()))


def hunyuan():
    from diffusers import HunyuanVideoPipeline

    parts = dict.fromkeys(("text_encoder", "tokenizer", "vae", "text_encoder_2", "tokenizer_2"))
    pipeline = HunyuanVideoPipeline(
        **parts, scheduler=flow_scheduler(), transformer=TINY["hunyuan"].build()
    )
    mask = torch.arange(MAX_TEXT)[None] < 9
    return pipeline, VIDEO | dict(
        prompt_embeds=randn(1, MAX_TEXT, 16),
        pooled_prompt_embeds=randn(1, 8),
        prompt_attention_mask=mask.long(),
    )


def cogvideox():
    from diffusers import CogVideoXDPMScheduler, CogVideoXPipeline

    pipeline = CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=CogVideoXDPMScheduler(),
        transformer=TINY["cogvideox"].build(),
    )
    text = dict(prompt_embeds=randn(1, MAX_TEXT, 8), negative_prompt_embeds=randn(1, MAX_TEXT, 8))
    return pipeline, VIDEO | text


def ltx():
    from diffusers import LTXPipeline

    scheduler = flow_scheduler(use_dynamic_shifting=True)
    pipeline = LTXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=scheduler,
        transformer=TINY["ltx"].build(),
    )
    mask = (torch.arange(MAX_TEXT)[None] < 9).long()
    return pipeline, VIDEO | dict(
        height=352,
        width=416,
        num_frames=17,
        prompt_embeds=randn(1, MAX_TEXT, 16),
        prompt_attention_mask=mask,
        negative_prompt_embeds=randn(1, MAX_TEXT, 16),
        negative_prompt_attention_mask=mask,
    )


def kandinsky5(**changes):
    from diffusers import Kandinsky5T2VPipeline

    parts = dict.fromkeys(("text_encoder", "tokenizer", "vae", "text_encoder_2", "tokenizer_2"))
    pipeline = Kandinsky5T2VPipeline(
        **parts, scheduler=flow_scheduler(), transformer=TINY["kandinsky5"].build(**changes)
    )
    lengths = torch.tensor([0, MAX_TEXT], dtype=torch.int32)
    return pipeline, VIDEO | dict(
        prompt_embeds_qwen=randn(1, MAX_TEXT, 16),
        prompt_embeds_clip=randn(1, 8),
        prompt_cu_seqlens=lengths,
        negative_prompt_embeds_qwen=randn(1, MAX_TEXT, 16) / 2,
        negative_prompt_embeds_clip=randn(1, 8) / 2,
        negative_prompt_cu_seqlens=lengths,
    )


def generate(pipeline, arguments, **changes):
    pipeline.set_progress_bar_config(disable=True)
    out = pipeline(**arguments | changes, generator=generator(), return_dict=False)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("build", [wan, wan_i2v, hunyuan, cogvideox, ltx, kandinsky5])
def test_pipelines_end_to_end(build):
    pipeline, arguments = build()
    dense = generate(pipeline, arguments)
    with na.apply(pipeline, "nabla-1"):
        assert relative_error(generate(pipeline, arguments), dense) < 1e-4
    schedule = na.Schedule(
        algorithm=na.parse("nabla-0.4"), dense_first_steps=1, step_overrides={2: na.parse("topk-1")}
    )
    with na.apply(pipeline, schedule=schedule) as handle:
        assert relative_error(generate(pipeline, arguments), dense) > 1e-4
        for _ in range(2):
            generate(pipeline, arguments)
            density = handle.report().density.mean(dim=(1, 2))
            assert density.shape == (STEPS,)
            assert density[0] == 1 and 0.2 < density[1] < 0.9 and density[2] == 1
    assert torch.equal(generate(pipeline, arguments), dense)


def test_steps_run_on_over_both_transformers_of_wan_2_2():
    pipeline, arguments = wan(transformer_2=TINY["wan"].build(), boundary_ratio=0.9)
    schedule = na.Schedule(algorithm=na.parse("nabla-0.4"), dense_last_steps=1)
    with na.apply(pipeline, schedule=schedule) as handle:
        generate(pipeline, arguments, num_inference_steps=5)
        report = handle.report()
    assert report.models[0] == "transformer" and report.models[-1] == "transformer_2"
    assert report.density.shape[0] == 5
    assert [bool(row.mean() == 1) for row in report.density] == [False] * 4 + [True]
    assert 0 < report.to_dict()["density"] < 1


def test_two_pipelines_with_different_settings():
    (first, arguments), (second, _) = wan(), wan()
    loose, tight = na.apply(first, "nabla-0.8"), na.apply(second, "nabla-0.3")
    generate(first, arguments)
    generate(second, arguments)
    assert loose.report().mean_density > 0.7 > 0.5 > tight.report().mean_density
    tight.remove()
    assert "nabla-0.8" not in str(second) and hasattr(first.transformer, "_nabla_attn")


def test_the_pipeline_is_not_kept_alive():
    pipeline, _ = wan()
    handle = na.apply(pipeline, "nabla-0.5")
    alive = weakref.ref(pipeline)
    del pipeline
    gc.collect()
    assert alive() is None
    handle.remove()


def test_a_pipeline_without_a_known_transformer_is_named():
    from diffusers import AutoencoderKLWan

    pipeline, _ = wan()
    pipeline.transformer = None
    with pytest.raises(ValueError, match="WanPipeline has no transformer"):
        na.apply(pipeline, "nabla-0.5")
    pipeline.transformer = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1])
    with pytest.raises(ValueError, match="AutoencoderKLWan is not a known model"):
        na.apply(pipeline, "nabla-0.5")


def test_kandinsky_checkpoint_trained_with_nabla_needs_no_algorithm():
    trained = dict(
        attention_type="nabla", attention_P=0.4, attention_wT=1, attention_wH=1, attention_wW=1
    )
    pipeline, arguments = kandinsky5(**trained)
    with na.apply(pipeline) as handle:
        ours = generate(pipeline, arguments)
        assert handle.report().mean_density < 0.9
    with na.apply(pipeline, "nabla-0.4_sta-1-1-1"):
        assert torch.equal(generate(pipeline, arguments), ours)
