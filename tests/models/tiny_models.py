"""Tiny random models of every class in the table, and inputs for a token grid of any size."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

BATCH = 2
NUM_TEXT = (11, 7)  # valid text tokens of the two samples
MAX_TEXT = 13

Inputs = dict[str, Any]
SMALL = dict(in_channels=4, out_channels=4, num_attention_heads=2, num_layers=2)
WAN = SMALL | dict(
    patch_size=(1, 2, 2),
    attention_head_dim=24,
    text_dim=16,
    freq_dim=32,
    ffn_dim=32,
    cross_attn_norm=True,
    rope_max_seq_len=96,
)
MOTIF = SMALL | dict(
    attention_head_dim=16,
    num_layers=1,
    num_single_layers=1,
    patch_size=2,
    patch_size_t=1,
    text_embed_dim=16,
    rope_axes_dim=(4, 6, 6),
)
HUNYUAN = MOTIF | dict(num_refiner_layers=1, pooled_projection_dim=8)
COGVIDEOX = SMALL | dict(
    attention_head_dim=16,
    time_embed_dim=8,
    text_embed_dim=8,
    sample_width=52,
    sample_height=52,
    sample_frames=9,
    temporal_compression_ratio=4,
    max_text_seq_length=MAX_TEXT,
    use_rotary_positional_embeddings=True,
)
COSMOS = SMALL | dict(
    attention_head_dim=24,
    text_embed_dim=16,
    adaln_lora_dim=4,
    max_size=(8, 64, 64),
    # Resizing that mask needs torchvision.
    concat_padding_mask=False,
    extra_pos_embed_type=None,
)
LTX = SMALL | dict(attention_head_dim=24, cross_attention_dim=48, caption_channels=16)
KANDINSKY6_SR = dict(
    in_visual_dim=4,
    out_visual_dim=4,
    time_dim=16,
    model_dim=48,
    ff_dim=32,
    num_visual_blocks=2,
    axes_dims=(8, 8, 8),
)
KANDINSKY = KANDINSKY6_SR | dict(in_text_dim=16, in_text_dim2=8, num_text_blocks=1)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def timesteps() -> torch.Tensor:
    return torch.full((BATCH,), 500.0)


def text_mask() -> torch.Tensor:
    mask = torch.zeros(BATCH, MAX_TEXT, dtype=torch.long)
    for sample, count in enumerate(NUM_TEXT):
        mask[sample, :count] = 1
    return mask


def video_inputs(frames: int, height: int, width: int, channels: int = 4) -> Inputs:
    """What most models take: latents in 1x2x2 patches, a time, text."""
    return dict(
        hidden_states=randn(BATCH, channels, frames, 2 * height, 2 * width),
        timestep=timesteps(),
        encoder_hidden_states=randn(BATCH, MAX_TEXT, 16),
    )


def vace_inputs(frames: int, height: int, width: int) -> Inputs:
    control = randn(BATCH, 6, frames, 2 * height, 2 * width)
    return video_inputs(frames, height, width) | dict(control_hidden_states=control)


def animate_inputs(frames: int, height: int, width: int) -> Inputs:
    # The reference frame comes first and has no pose.
    return video_inputs(frames, height, width, channels=12) | dict(
        pose_hidden_states=randn(BATCH, 4, frames - 1, 2 * height, 2 * width),
        face_pixel_values=randn(BATCH, 3, 4 * (frames - 2) + 1, 16, 16),
    )


def anyflow_inputs(frames: int, height: int, width: int) -> Inputs:
    return video_inputs(frames, height, width) | dict(
        hidden_states=randn(BATCH, frames, 4, 2 * height, 2 * width),
        timestep=torch.full((BATCH, frames), 500.0),
        r_timestep=torch.full((BATCH, frames), 250.0),
    )


def helios_inputs(frames: int, height: int, width: int) -> Inputs:
    inputs = video_inputs(frames, height, width)
    first = 0
    for length, count in (("long", 5), ("mid", 2), ("short", 2)):
        latents = randn(BATCH, 4, count, 2 * height, 2 * width)
        indices = torch.arange(first, first + count).expand(BATCH, -1)
        inputs[f"latents_history_{length}"] = latents
        inputs[f"indices_latents_history_{length}"] = indices
        first += count
    return inputs | dict(
        indices_hidden_states=torch.arange(first, first + frames).expand(BATCH, -1)
    )


def motif_inputs(frames: int, height: int, width: int) -> Inputs:
    mask = text_mask()
    return video_inputs(frames, height, width) | dict(encoder_attention_mask=mask)


def hunyuan_inputs(frames: int, height: int, width: int) -> Inputs:
    return motif_inputs(frames, height, width) | dict(
        pooled_projections=randn(BATCH, 8), guidance=torch.full((BATCH,), 6000.0)
    )


def framepack_inputs(frames: int, height: int, width: int) -> Inputs:
    rows, columns = 2 * height, 2 * width
    return hunyuan_inputs(frames, height, width) | dict(
        image_embeds=randn(BATCH, 3, 12),
        indices_latents=torch.arange(7, 7 + frames),
        latents_clean=randn(BATCH, 4, 2, rows, columns),
        indices_latents_clean=torch.tensor([0, 6]),
        latents_history_2x=randn(BATCH, 4, 2, rows, columns),
        indices_latents_history_2x=torch.arange(4, 6),
        latents_history_4x=randn(BATCH, 4, 3, rows, columns),
        indices_latents_history_4x=torch.arange(1, 4),
    )


def hunyuan15_inputs(frames: int, height: int, width: int) -> Inputs:
    return dict(
        hidden_states=randn(BATCH, 4, frames, height, width),
        timestep=timesteps(),
        encoder_hidden_states=randn(BATCH, MAX_TEXT, 16),
        encoder_attention_mask=text_mask(),
        encoder_hidden_states_2=randn(BATCH, 5, 12),
        encoder_attention_mask_2=torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
        image_embeds=randn(BATCH, 6, 10),
    )


def kandinsky5_inputs(frames: int, height: int, width: int) -> Inputs:
    return dict(
        hidden_states=randn(BATCH, frames, 2 * height, 2 * width, 4),
        encoder_hidden_states=randn(BATCH, MAX_TEXT, 16),
        timestep=timesteps(),
        pooled_projections=randn(BATCH, 8),
        visual_rope_pos=tuple(torch.arange(size) for size in (frames, height, width)),
        text_rope_pos=torch.arange(MAX_TEXT),
    )


def kandinsky6_inputs(frames: int, height: int, width: int) -> Inputs:
    return dict(
        hidden_states=randn(BATCH, frames, 2 * height, 2 * width, 9),
        encoder_hidden_states=randn(BATCH, MAX_TEXT, 16),
        pooled_projections=randn(BATCH, 8),
        timestep=timesteps(),
        audio_hidden_states=randn(BATCH, 5, 6),
        encoder_attention_mask=text_mask().bool(),
    )


def kandinsky6_sr_inputs(frames: int, height: int, width: int) -> Inputs:
    return dict(hidden_states=randn(BATCH, frames, height, width, 9), timestep=timesteps())


def cosmos_inputs(frames: int, height: int, width: int) -> Inputs:
    return video_inputs(frames, height, width) | dict(fps=24)


def cosmos25_inputs(frames: int, height: int, width: int) -> Inputs:
    inputs = cosmos_inputs(frames, height, width)
    image = randn(BATCH, 5, 6)
    return inputs | dict(encoder_hidden_states=(inputs["encoder_hidden_states"], image))


def ltx_inputs(frames: int, height: int, width: int) -> Inputs:
    return dict(
        hidden_states=randn(BATCH, frames * height * width, 4),
        encoder_hidden_states=randn(BATCH, MAX_TEXT, 16),
        timestep=timesteps(),
        encoder_attention_mask=text_mask(),
        num_frames=frames,
        height=height,
        width=width,
    )


def ltx2_inputs(frames: int, height: int, width: int) -> Inputs:
    return ltx_inputs(frames, height, width) | dict(
        audio_hidden_states=randn(BATCH, 9, 4),
        audio_encoder_hidden_states=randn(BATCH, MAX_TEXT, 16),
        audio_timestep=timesteps(),
        audio_num_frames=9,
        audio_encoder_attention_mask=text_mask(),
    )


def cogvideox_inputs(frames: int, height: int, width: int, patch_frames: int = 1) -> Inputs:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    size = (height, width)
    kwargs = dict(grid_type="slice", max_size=size) if patch_frames > 1 else {}
    rotary = get_3d_rotary_pos_embed(16, ((0, 0), size), size, frames, **kwargs)
    return dict(
        hidden_states=randn(BATCH, frames * patch_frames, 4, 2 * height, 2 * width),
        encoder_hidden_states=randn(BATCH, MAX_TEXT, 8),
        timestep=timesteps(),
        image_rotary_emb=rotary,
    )


def cogvideox15_inputs(frames: int, height: int, width: int) -> Inputs:
    return cogvideox_inputs(frames, height, width, patch_frames=2)


def mochi_inputs(frames: int, height: int, width: int) -> Inputs:
    mask = text_mask().bool()
    return video_inputs(frames, height, width) | dict(encoder_attention_mask=mask)


def allegro_inputs(frames: int, height: int, width: int) -> Inputs:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    size = (height, width)
    parts = get_3d_rotary_pos_embed_allegro(24, ((0, 0), size), size, frames, (1.0, 1.0, 1.0))
    positions = torch.cartesian_prod(*(axis.long() for axis in parts[3:])).T.unsqueeze(1)
    return motif_inputs(frames, height, width) | dict(image_rotary_emb=(parts[:3], positions))


@dataclass(frozen=True)
class Tiny:
    """A class of diffusers, a tiny config of it, and its inputs for a grid."""

    name: str
    config: dict[str, Any]
    inputs: Callable[[int, int, int], Inputs]

    def build(self, **changes: Any) -> Any:
        """The model with random weights, all of them, in eval mode."""
        import diffusers

        torch.manual_seed(0)
        model = getattr(diffusers, self.name)(**self.config | changes).eval()
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            # Some layers start at zero, which would hide the attention.
            if parameter.detach().abs().sum() == 0:
                parameter.data.normal_(std=0.1, generator=generator)
        return model


TINY = {
    "wan": Tiny("WanTransformer3DModel", WAN, video_inputs),
    "wan-vace": Tiny(
        "WanVACETransformer3DModel", WAN | dict(vace_layers=[0], vace_in_channels=6), vace_inputs
    ),
    "wan-animate": Tiny(
        "WanAnimateTransformer3DModel",
        WAN
        | dict(
            in_channels=12,
            latent_channels=4,
            image_dim=None,
            motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
            motion_encoder_size=16,
            motion_style_dim=8,
            motion_dim=4,
            motion_encoder_dim=16,
            face_encoder_hidden_dim=16,
            face_encoder_num_heads=2,
            inject_face_latents_blocks=2,
        ),
        animate_inputs,
    ),
    "skyreels": Tiny("SkyReelsV2Transformer3DModel", WAN, video_inputs),
    "chronoedit": Tiny("ChronoEditTransformer3DModel", WAN, video_inputs),
    "anyflow": Tiny("AnyFlowTransformer3DModel", WAN, anyflow_inputs),
    "helios": Tiny(
        "HeliosTransformer3DModel",
        {k: v for k, v in WAN.items() if k != "rope_max_seq_len"} | dict(rope_dim=(8, 8, 8)),
        helios_inputs,
    ),
    "hunyuan": Tiny("HunyuanVideoTransformer3DModel", HUNYUAN, hunyuan_inputs),
    "framepack": Tiny(
        "HunyuanVideoFramepackTransformer3DModel",
        HUNYUAN | dict(has_image_proj=True, image_proj_dim=12, has_clean_x_embedder=True),
        framepack_inputs,
    ),
    "hunyuan15": Tiny(
        "HunyuanVideo15Transformer3DModel",
        SMALL
        | dict(
            attention_head_dim=16,
            num_refiner_layers=1,
            text_embed_dim=16,
            text_embed_2_dim=12,
            image_embed_dim=10,
            rope_axes_dim=(4, 6, 6),
        ),
        hunyuan15_inputs,
    ),
    "kandinsky5": Tiny(
        "Kandinsky5Transformer3DModel",
        # It rounds q and k to bfloat16, so a second block would amplify the last bit of fp32.
        KANDINSKY | dict(num_visual_blocks=1),
        kandinsky5_inputs,
    ),
    "kandinsky6": Tiny(
        "Kandinsky6Transformer3DModel",
        KANDINSKY | dict(in_audio_dim=6, out_audio_dim=6),
        kandinsky6_inputs,
    ),
    "kandinsky6-sr": Tiny(
        "Kandinsky6SRTransformer3DModel",
        KANDINSKY6_SR | dict(nabla_threshold=0.5, nabla_window=(1, 1, 1)),
        kandinsky6_sr_inputs,
    ),
    "cosmos": Tiny("CosmosTransformer3DModel", COSMOS, cosmos_inputs),
    "cosmos1": Tiny(
        "CosmosTransformer3DModel", COSMOS | dict(extra_pos_embed_type="learnable"), cosmos_inputs
    ),
    "cosmos25": Tiny(
        "CosmosTransformer3DModel",
        COSMOS
        | dict(
            use_crossattn_projection=True,
            crossattn_proj_in_channels=16,
            encoder_hidden_states_channels=16,
            img_context_dim_in=6,
            img_context_num_tokens=5,
            img_context_dim_out=48,
        ),
        cosmos25_inputs,
    ),
    "ltx": Tiny(
        "LTXVideoTransformer3DModel",
        LTX,
        ltx_inputs,
    ),
    "ltx2": Tiny(
        "LTX2VideoTransformer3DModel",
        LTX
        | dict(
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=2,
            audio_attention_head_dim=12,
            audio_cross_attention_dim=24,
        ),
        ltx2_inputs,
    ),
    "cogvideox": Tiny("CogVideoXTransformer3DModel", COGVIDEOX, cogvideox_inputs),
    "cogvideox15": Tiny(
        "CogVideoXTransformer3DModel",
        COGVIDEOX | dict(patch_size_t=2, patch_bias=False),
        cogvideox15_inputs,
    ),
    "consisid": Tiny("ConsisIDTransformer3DModel", COGVIDEOX, cogvideox_inputs),
    "mochi": Tiny(
        "MochiTransformer3DModel",
        dict(
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            pooled_projection_dim=16,
            in_channels=4,
            text_embed_dim=16,
            time_embed_dim=8,
            max_sequence_length=MAX_TEXT,
        ),
        mochi_inputs,
    ),
    "allegro": Tiny(
        "AllegroTransformer3DModel",
        LTX | dict(sample_height=52, sample_width=52),
        allegro_inputs,
    ),
    "easyanimate": Tiny(
        "EasyAnimateTransformer3DModel",
        SMALL
        | dict(
            attention_head_dim=32,
            patch_size=2,
            mmdit_layers=1,
            time_embed_dim=8,
            text_embed_dim=16,
        ),
        video_inputs,
    ),
    "motif": Tiny("MotifVideoTransformer3DModel", MOTIF, motif_inputs),
}


def run(model: Any, inputs: Inputs) -> torch.Tensor:
    """The model's video output."""
    out = model(**inputs, return_dict=False)
    return out[0] if isinstance(out, tuple) else out


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return ((out - expected).abs().max() / expected.abs().max()).item()
