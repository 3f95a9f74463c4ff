"""Whole tiny random pipelines of every family that can be trained, without Wan's."""

from types import SimpleNamespace

import torch
from tests.models.tiny_models import TINY
from tests.tiny_diffusers import tiny_tokenizer, tiny_wan_vae
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5EncoderModel,
)
from transformers.modeling_outputs import BaseModelOutput

SIZES = dict.fromkeys(("ltx", "ltx_i2v", "ltx2", "ltx2_i2v"), (9, 32, 64)) | {"mochi": (7, 32, 48)}
KINDS = [
    "wan_i2v",
    "wan22_i2v",
    "skyreels",
    "skyreels_i2v",
    "hunyuan",
    "hunyuan_i2v",
    "hunyuan15",
    "motif",
    "easyanimate",
    "ltx",
    "ltx_i2v",
    "ltx2",
    "ltx2_i2v",
    "cogvideox",
    "cogvideox15",
    "cogvideox_i2v",
    "cogvideox15_i2v",
    "kandinsky5",
    "kandinsky5_i2v",
    "mochi",
]
QWEN = dict(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=2,
    bos_token_id=1,
    eos_token_id=1,
    pad_token_id=0,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
)


def t5(width):
    torch.manual_seed(1)
    config = T5Config(
        vocab_size=64, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return {"tokenizer": tiny_tokenizer(), "text_encoder": T5EncoderModel(config).eval()}


def clip_text(width):
    tokenizer = tiny_tokenizer()
    config = CLIPTextConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=16,
        projection_dim=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
        eos_token_id=1,
        bos_token_id=1,
        pad_token_id=0,
    )
    tokenizer.model_max_length = 77
    return {"tokenizer_2": tokenizer, "text_encoder_2": CLIPTextModel(config).eval()}


def behind_template(count):
    """A tokenizer whose text starts after the template's tokens, which the pipelines cut off."""
    words = tiny_tokenizer()

    def tokenize(text, images=None, videos=None, max_length=None, **options):
        if max_length is not None:
            options["max_length"] = max_length - count
        found = words(text, **options)
        if "return_tensors" not in options:
            return found
        for name in ("input_ids", "attention_mask"):
            start = torch.ones(len(text), count, dtype=torch.long)
            found[name] = torch.cat([start, found[name]], 1)
        return found

    tokenize.unk_token_id = words.unk_token_id
    return tokenize


def flow_scheduler(**kwargs):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**kwargs)


def hunyuan_vae():
    from diffusers import AutoencoderKLHunyuanVideo

    return AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()


def hunyuan(kind="HunyuanVideoPipeline", **changes):
    import diffusers

    llama = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
    )
    return getattr(diffusers, kind)(
        text_encoder=LlamaModel(llama).eval(),
        tokenizer=behind_template(95),
        **clip_text(8),
        vae=hunyuan_vae(),
        scheduler=flow_scheduler(shift=7.0),
        transformer=TINY["hunyuan"].build(**changes),
    )


def hunyuan_i2v():
    return hunyuan("HunyuanSkyreelsImageToVideoPipeline", in_channels=8, out_channels=4)


def hunyuan15():
    from diffusers import (
        AutoencoderKLHunyuanVideo15,
        ClassifierFreeGuidance,
        HunyuanVideo15Pipeline,
    )
    from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(16,) * 5, layers_per_block=1
    ).eval()
    qwen = Qwen2_5_VLTextConfig(**QWEN)
    tokenizer, glyphs = tiny_tokenizer(), t5(12)
    # As long as the template whose tokens the pipeline cuts off.
    tokenizer.chat_template = "{{ 'a ' * 108 }}{{ messages[-1]['content'] }}"
    return HunyuanVideo15Pipeline(
        text_encoder=Qwen2_5_VLTextModel(qwen).eval(),
        tokenizer=tokenizer,
        text_encoder_2=glyphs["text_encoder"],
        tokenizer_2=glyphs["tokenizer"],
        vae=vae,
        scheduler=flow_scheduler(shift=5.0),
        transformer=TINY["hunyuan15"].build(in_channels=9, out_channels=4),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
    )


def motif():
    from diffusers import ClassifierFreeGuidance, MotifVideoPipeline

    return MotifVideoPipeline(
        **t5(16),
        vae=tiny_wan_vae(),
        scheduler=flow_scheduler(use_dynamic_shifting=True),
        transformer=TINY["motif"].build(in_channels=9, out_channels=4),
        guider=ClassifierFreeGuidance(guidance_scale=8.0),
    )


def unipc(shift):
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )


def clip_vision():
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    vision = CLIPVisionConfig(
        hidden_size=12,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    torch.manual_seed(2)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    return {"image_processor": processor, "image_encoder": CLIPVisionModel(vision).eval()}


def wan_i2v(**options):
    """With an image encoder, as Wan 2.1 has one."""
    from diffusers import WanImageToVideoPipeline

    return WanImageToVideoPipeline(
        **t5(16),
        **clip_vision(),
        vae=tiny_wan_vae(),
        scheduler=unipc(5.0),
        transformer=TINY["wan"].build(
            in_channels=12, image_dim=12, added_kv_proj_dim=48, **options
        ),
    )


def wan22_i2v():
    """Each token with a time of its own, as Wan 2.2 5B has it; no image encoder."""
    from diffusers import WanImageToVideoPipeline

    return WanImageToVideoPipeline(
        **t5(16),
        image_processor=None,
        image_encoder=None,
        vae=tiny_wan_vae(),
        scheduler=unipc(5.0),
        transformer=TINY["wan"].build(),
        expand_timesteps=True,
    )


def skyreels():
    from diffusers import SkyReelsV2Pipeline

    return SkyReelsV2Pipeline(
        **t5(16), vae=tiny_wan_vae(), scheduler=unipc(8.0), transformer=TINY["skyreels"].build()
    )


def skyreels_i2v():
    from diffusers import SkyReelsV2ImageToVideoPipeline

    return SkyReelsV2ImageToVideoPipeline(
        **t5(16),
        **clip_vision(),
        vae=tiny_wan_vae(),
        scheduler=unipc(5.0),
        transformer=TINY["skyreels"].build(in_channels=12, image_dim=12, added_kv_proj_dim=48),
    )


def easyanimate():
    from diffusers import AutoencoderKLMagvit, EasyAnimatePipeline
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vae = AutoencoderKLMagvit(
        latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4
    ).eval()
    vision = {"depth": 1, "embed_dim": 8, "num_heads": 2, "hidden_size": 16}
    qwen = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=QWEN, vision_config=vision))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[-1]['content'][0]['text'] }}"
    return EasyAnimatePipeline(
        text_encoder=qwen.eval(),
        tokenizer=tokenizer,
        vae=vae,
        scheduler=flow_scheduler(shift=1.0),
        transformer=TINY["easyanimate"].build(),
    )


def ltx(pipeline="LTXPipeline"):
    import diffusers
    from diffusers import AutoencoderKLLTXVideo

    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
    ).eval()
    vae.latents_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    vae.latents_std.copy_(torch.tensor([1.5, 0.5, 2.0, 1.0]))
    return getattr(diffusers, pipeline)(
        **t5(16),
        vae=vae,
        scheduler=flow_scheduler(use_dynamic_shifting=True),
        transformer=TINY["ltx"].build(),
    )


def ltx_i2v():
    return ltx("LTXImageToVideoPipeline")


def ltx2(pipeline="LTX2Pipeline", **changes):
    import diffusers
    from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
    from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

    vae = AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 3,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 4,
        upsample_residual=(False,) * 3,
        upsample_factor=(1,) * 3,
        patch_size=1,
        spatial_compression_ratio=8,
        temporal_compression_ratio=8,
    ).eval()
    sound = AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, latent_channels=2, mel_bins=8
    ).eval()
    connectors = LTX2TextConnectors(
        caption_channels=16,
        text_proj_in_factor=2,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
    ).eval()
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 16
    return getattr(diffusers, pipeline)(
        text_encoder=Words(layers=2),
        tokenizer=tokenizer,
        connectors=connectors,
        vae=vae,
        audio_vae=sound,
        vocoder=LTX2Vocoder(in_channels=16, hidden_channels=32),
        scheduler=flow_scheduler(use_dynamic_shifting=True),
        transformer=TINY["ltx2"].build(**changes),
    )


def ltx2_i2v():
    """As in LTX-2.3: gated attention, and time in the attention of the text."""
    names = ("gated_attn", "cross_attn_mod", "audio_gated_attn", "audio_cross_attn_mod")
    return ltx2("LTX2ImageToVideoPipeline", **dict.fromkeys(names, True))


def cogvideox(kind="cogvideox", pipeline="CogVideoXPipeline", **changes):
    import diffusers
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler

    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    ).eval()
    transformer = TINY[kind].build(max_text_seq_length=226, **changes)
    scheduler = CogVideoXDDIMScheduler(prediction_type="v_prediction")
    return getattr(diffusers, pipeline)(
        **t5(8), vae=vae, scheduler=scheduler, transformer=transformer
    )


def cogvideox15():
    return cogvideox("cogvideox15")


def cogvideox_i2v(kind="cogvideox", **changes):
    return cogvideox(
        kind, "CogVideoXImageToVideoPipeline", in_channels=8, out_channels=4, **changes
    )


def cogvideox15_i2v():
    return cogvideox_i2v("cogvideox15", ofs_embed_dim=8)


class Words(torch.nn.Module):
    """Stands for a language model: an embedding of its tokens."""

    def __init__(self, layers=1):
        super().__init__()
        self.layers = layers
        self.table = torch.nn.Embedding(64, 16)
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def forward(self, input_ids, **_):
        return BaseModelOutput(hidden_states=(self.table(input_ids),) * self.layers)


def kandinsky5(pipeline="Kandinsky5T2VPipeline", **changes):
    import diffusers

    return getattr(diffusers, pipeline)(
        text_encoder=Words(),
        tokenizer=behind_template(129),
        **clip_text(8),
        vae=hunyuan_vae(),
        scheduler=flow_scheduler(shift=5.0),
        transformer=TINY["kandinsky5"].build(**changes),
    )


def kandinsky5_i2v():
    return kandinsky5("Kandinsky5I2VPipeline", visual_cond=True)


def mochi():
    from diffusers import AutoencoderKLMochi, MochiPipeline

    vae = AutoencoderKLMochi(
        latent_channels=12,
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    ).eval()
    return MochiPipeline(
        **t5(16),
        vae=vae,
        scheduler=flow_scheduler(invert_sigmas=True),
        transformer=TINY["mochi"].build(in_channels=12, max_sequence_length=256),
    )


def without(pipeline, **parts):
    """A stand-in of the same class with other parts."""
    kind = type(pipeline.__class__.__name__, (SimpleNamespace,), {})
    return kind(**pipeline.components | parts, config=pipeline.config)


def size_of(kind):
    """Frames, height and width of a small video that the pipeline takes."""
    return SIZES.get(kind, (5, 32, 48))
