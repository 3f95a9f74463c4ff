"""Real pipelines of diffusers around the tiny models."""

import torch
from tests.models.tiny_models import MAX_TEXT, TINY, randn
from tests.tiny_diffusers import tiny_wan_vae
from tests.training.tiny_pipelines import ltx2 as whole_ltx2

STEPS = 3
VIDEO = dict(num_inference_steps=STEPS, output_type="latent", num_frames=9, height=176, width=208)

LONG = VIDEO | dict(prompt=None, height=64, width=64)


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


def once_a_video(encode):
    """Encode each video once: that takes longer than to denoise one."""
    known = []

    def encode_or_recall(video):
        for seen, encoded in known:
            if torch.equal(seen, video):
                return encoded
        known.append((video.clone(), encode(video)))
        return known[-1][1]

    return encode_or_recall


def wan_i2v(**changes):
    from diffusers import WanImageToVideoPipeline

    transformer = TINY["wan"].build(in_channels=12, **changes)
    vae = tiny_wan_vae(base_dim=4)
    vae.encode = once_a_video(vae.encode)
    parts = dict(tokenizer=None, text_encoder=None, vae=vae, scheduler=flow_scheduler())
    pipeline = WanImageToVideoPipeline(
        **parts, image_processor=None, image_encoder=None, transformer=transformer
    )
    text = dict(prompt_embeds=randn(1, MAX_TEXT, 16), negative_prompt_embeds=randn(1, MAX_TEXT, 16))
    return pipeline, VIDEO | text | dict(image=torch.rand(1, 3, 176, 208, generator=generator()))


def wan_flf2v():
    """First and last frame, whose image embeddings go to the cross-attention, as in Wan 2.1."""
    pipeline, arguments = wan_i2v(image_dim=12, added_kv_proj_dim=48, pos_embed_seq_len=6)
    last = torch.rand(1, 3, 176, 208, generator=generator())
    pipeline.encode_image = lambda images, device: randn(len(images), 3, 12)
    return pipeline, arguments | dict(last_image=last)


def wan_ti2v():
    """Wan 2.2 5B: each token has a time of its own."""
    pipeline, arguments = wan()
    pipeline.register_to_config(expand_timesteps=True)
    return pipeline, arguments


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


def ltx2():
    """Video and sound, with all the guidance it has: four calls a step."""
    return whole_ltx2(), VIDEO | dict(
        prompt="a", height=192, width=224, num_frames=17, spatio_temporal_guidance_blocks=[1]
    )


def skyreels_forcing():
    """Three windows; each starts with the end of the one before, already denoised."""
    from diffusers import SkyReelsV2DiffusionForcingPipeline, UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
    )
    pipeline = SkyReelsV2DiffusionForcingPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=tiny_wan_vae(base_dim=4),
        scheduler=scheduler,
        transformer=TINY["skyreels"].build(),
    )
    return pipeline, LONG | dict(
        num_frames=33,
        base_num_frames=17,
        overlap_history=9,
        prompt_embeds=randn(1, MAX_TEXT, 16),
        negative_prompt_embeds=randn(1, MAX_TEXT, 16),
    )


def framepack():
    """Three sections."""
    from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoFramepackPipeline

    texts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    parts = dict.fromkeys((*texts, "image_encoder", "feature_extractor"))
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4
    )
    scheduler = flow_scheduler(use_dynamic_shifting=True)
    pipeline = HunyuanVideoFramepackPipeline(
        **parts, vae=vae.eval(), scheduler=scheduler, transformer=TINY["framepack"].build()
    )
    pipeline.encode_image = lambda image, device: randn(len(image), 3, 12)
    return pipeline, LONG | dict(
        image=torch.rand(1, 3, 64, 64, generator=generator()),
        num_frames=27,
        latent_window_size=3,
        prompt_embeds=randn(1, MAX_TEXT, 16),
        pooled_prompt_embeds=randn(1, 8),
        prompt_attention_mask=torch.ones(1, MAX_TEXT, dtype=torch.long),
    )


def helios():
    """Three chunks."""
    from diffusers import HeliosPipeline, HeliosScheduler

    pipeline = HeliosPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=tiny_wan_vae(base_dim=4),
        scheduler=HeliosScheduler(stages=1, stage_range=[0, 1]),
        transformer=TINY["helios"].build(),
    )
    return pipeline, LONG | dict(
        num_frames=27,
        num_latent_frames_per_chunk=3,
        history_sizes=[4, 2, 1],
        prompt_embeds=randn(1, MAX_TEXT, 16),
        negative_prompt_embeds=randn(1, MAX_TEXT, 16),
    )


def helios_pyramid():
    """Two chunks of three stages, each at twice the size of the one before."""
    from diffusers import HeliosPyramidPipeline, HeliosScheduler

    pipeline, arguments = helios()
    # At diffusers' own gamma of a third the covariance of a block's noise is singular: whether its
    # factorization succeeds is a matter of how a CPU rounds.
    scheduler = HeliosScheduler(gamma=0.3)
    pipeline = HeliosPyramidPipeline(**pipeline.components | {"scheduler": scheduler})
    del arguments["num_inference_steps"]
    return pipeline, arguments | dict(
        num_frames=18, height=128, width=128, pyramid_num_inference_steps_list=[2, 3, 2]
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
