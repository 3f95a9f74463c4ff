"""Tiny random models in diffusers' layout."""

from pathlib import Path
from typing import Any

TEXT = (
    "a an and with on big small red green blue yellow white black orange purple circle square "
    "triangle moving left right up down background dark light gray"
)


def tiny_tokenizer() -> Any:
    """A word-level tokenizer of `TEXT`, closing every prompt with `</s>`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ("<pad>", "</s>", "<unk>")
    vocabulary = {word: index for index, word in enumerate((*special, *TEXT.split()))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_wan_transformer(**changes: Any) -> Any:
    """A random `WanTransformer3DModel`: 2 layers, 2 heads of 16, 4 latent channels.

    Args:
        changes: Config values to change.
    """
    import torch
    from diffusers import WanTransformer3DModel

    config = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 32,
        "ffn_dim": 32,
        "num_layers": 2,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 64,
    }
    torch.manual_seed(0)
    model: Any = WanTransformer3DModel(**(config | changes))
    return model.eval()


def tiny_wan_vae(base_dim: int = 8) -> Any:
    """A Wan VAE with random weights and 4 latent channels, in eval mode."""
    from diffusers import AutoencoderKLWan

    vae: Any = AutoencoderKLWan(
        base_dim=base_dim,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return vae.eval()


def tiny_wan_pipeline(directory: str | Path, **changes: Any) -> Path:
    """Write a random `WanPipeline` of 0.4 MB; its VAE takes sizes 16n and frames 4n+1.

    Args:
        directory: The folder to write.
        changes: Values of the transformer's config to change.

    Returns:
        The directory.
    """
    import torch
    from diffusers import UniPCMultistepScheduler, WanPipeline
    from transformers import UMT5Config, UMT5EncoderModel

    transformer = tiny_wan_transformer(**changes)
    tokenizer = tiny_tokenizer()
    torch.manual_seed(1)
    text = UMT5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    vae = tiny_wan_vae()
    pipeline: Any = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(text).eval(),
        vae=vae,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=transformer,
    )
    pipeline.save_pretrained(directory)
    return Path(directory)
