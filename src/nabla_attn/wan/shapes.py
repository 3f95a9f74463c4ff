"""Model configs read off the shapes of the weights, so that checkpoints of any size load.

Names and shapes come from files that may lie: every tensor is looked up with the number of axes it
must have, and every count of blocks is held against the tensors that are there.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le

from nabla_attn.validation import read_values
from nabla_attn.wan.tensor_files import TensorInfo, read_config

Infos = Mapping[str, TensorInfo]
Config = dict[str, Any]


@dataclass(frozen=True)
class WanConfig:
    """What is read of the config.json beside a transformer; weights tell the rest.

    Attributes:
        num_heads: Number of attention heads; None where heads are 128 wide.
        eps: Addend of the norms.
        text_len: Number of tokens that prompts are padded to.
        vace_layers: Layers with a VACE block; None where they are spread evenly.
        sparse_algo: The algorithm that the weights were trained for.
    """

    num_heads: Annotated[int, Ge(1), Le(1024)] | None = None
    eps: Annotated[float, Gt(0), Le(1)] = 1e-6
    text_len: Annotated[int, Ge(1), Le(4096)] = 512
    vace_layers: list[int] | None = None
    sparse_algo: str | None = None

    @classmethod
    def load(cls, path: Path) -> "WanConfig":
        """Read a config.json; where there is none, the defaults hold.

        Raises:
            ValueError: It is no JSON object, or a value has another type or is out of bounds.
        """
        values = read_config(path) if path.is_file() else {}
        known = {field.name for field in fields(cls)}
        given = {name: value for name, value in values.items() if name in known}
        try:
            return read_values(cls, {k: v for k, v in given.items() if v is not None})
        except ValueError as error:
            raise ValueError(
                f"{path}: {error} Take the config.json that came with the weights."
            ) from error


# Per-channel mean and spread of the Wan 2.2 latents (Wan2.2 wan/modules/vae2_2.py, Wan2_2_VAE).
# fmt: off
LATENTS_MEAN_2_2 = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813,
    0.0891, 0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108,
    -0.2158, 0.2502, -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313,
    -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944,
    0.3573, -0.0548, -0.1681, -0.0667,
)
LATENTS_STD_2_2 = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
# fmt: on
CLIP_HEAD_DIM = 80  # ViT-H/14: 1280 wide, 16 heads
WAN_HEAD_DIM = 128  # every released Wan
MAX_BLOCKS = 512  # the largest released model has 40
MAX_HEAD_DIM = 1024  # tables of positions grow with it


def _axes(infos: Infos, name: str, count: int) -> tuple[int, ...]:
    """The shape of a tensor that must be there with `count` axes."""
    if name not in infos:
        raise ValueError(f"it is without tensor {name}. Download it again.")
    shape = infos[name].shape
    if len(shape) != count or min(shape, default=1) < 1:
        raise ValueError(
            f"{name} has shape {list(shape)}, expected {count} axes of at least 1. Download it "
            "again."
        )
    return shape


def _num_blocks(infos: Infos, prefix: str, suffix: str = "") -> int:
    """The number of blocks `prefix.0`, `prefix.1` and so on that have a tensor `suffix...`."""
    pattern = re.compile(rf"{re.escape(prefix)}\.([0-9]+)\.{re.escape(suffix)}", re.ASCII)
    labels = {match[1] for match in map(pattern.match, infos) if match}
    if len(labels) > MAX_BLOCKS:
        raise ValueError(f"it has {len(labels)} blocks {prefix}, at most {MAX_BLOCKS} are read.")
    if strangers := sorted(labels - {str(index) for index in range(len(labels))}):
        raise ValueError(
            f"it has {len(labels)} blocks {prefix}, and one of them is {prefix}.{strangers[0]:.12}."
            " They must be numbered from 0 without gaps. Download it again."
        )
    if not labels:
        raise ValueError(f"it has no block {prefix}.0. Download it again.")
    return len(labels)


def _num_heads(width: int, given: Any, head_dim: int, remedy: str) -> int:
    heads = given if given is not None else width // head_dim
    is_guess_wrong = given is None and width % head_dim != 0
    if not isinstance(heads, int) or heads < 1 or width % heads or is_guess_wrong:
        raise ValueError(
            f"{width} channels do not split into {heads} heads; weights do not tell how many "
            f"there are. {remedy}"
        )
    if width // heads > MAX_HEAD_DIM:
        raise ValueError(
            f"{width} channels in {heads} heads are {width // heads} a head, at most "
            f"{MAX_HEAD_DIM} are read. {remedy}"
        )
    return heads


def transformer_config(infos: Infos, original: WanConfig) -> Config:
    """Arguments of `WanTransformer3DModel` or, with `vace_layers`, of the VACE one.

    Args:
        infos: Tensors in the original layout, without prefix.
        original: The checkpoint's config.json; heads, eps and VACE layers come from it.
    """
    width, in_channels, *patch = _axes(infos, "patch_embedding.weight", 5)
    heads = _num_heads(
        width, original.num_heads, WAN_HEAD_DIM, "Put num_heads into its config.json."
    )
    has_image = "blocks.0.cross_attn.k_img.weight" in infos
    has_norm = "blocks.0.self_attn.norm_q.weight" in infos
    config: Config = {
        "patch_size": tuple(patch),
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": in_channels,
        "out_channels": _axes(infos, "head.head.weight", 2)[0] // math.prod(patch),
        "text_dim": _axes(infos, "text_embedding.0.weight", 2)[1],
        "freq_dim": _axes(infos, "time_embedding.0.weight", 2)[1],
        "ffn_dim": _axes(infos, "blocks.0.ffn.0.weight", 2)[0],
        "num_layers": _num_blocks(infos, "blocks"),
        "cross_attn_norm": "blocks.0.norm3.weight" in infos,
        "qk_norm": "rms_norm_across_heads" if has_norm else None,
        "eps": original.eps,
        "image_dim": _axes(infos, "img_emb.proj.0.weight", 1)[0] if has_image else None,
        "added_kv_proj_dim": width if has_image else None,
    }
    if "img_emb.emb_pos" in infos:
        config["pos_embed_seq_len"] = _axes(infos, "img_emb.emb_pos", 3)[1]
    if "vace_patch_embedding.weight" in infos:
        config["vace_in_channels"] = _axes(infos, "vace_patch_embedding.weight", 5)[1]
        config["vace_layers"] = _vace_layers(infos, original, config["num_layers"])
    return config


def _vace_layers(infos: Infos, original: WanConfig, num_layers: int) -> list[int]:
    num_blocks = _num_blocks(infos, "vace_blocks")
    layers = original.vace_layers or list(range(0, num_layers, num_layers // num_blocks or 1))
    if len(layers) != num_blocks:
        raise ValueError(
            f"config.json names {len(layers)} vace_layers, the weights have {num_blocks} VACE "
            "blocks. Take the config.json that came with the weights."
        )
    if layers != sorted(set(layers)) or layers[0] != 0 or layers[-1] >= num_layers:
        raise ValueError(
            f"vace_layers in config.json must rise from 0 to below {num_layers}, got {layers}. "
            "Take the config.json that came with the weights."
        )
    return layers


def vae_config(infos: Infos) -> Config:
    """Arguments of `AutoencoderKLWan` for the Wan 2.1 VAE, a flat list of blocks."""
    levels: list[list[int]] = [[]]
    has_time_conv = []
    for index in range(_num_blocks(infos, "encoder.downsamples")):
        block = f"encoder.downsamples.{index}"
        if f"{block}.resample.1.weight" in infos:
            has_time_conv.append(f"{block}.time_conv.weight" in infos)
            levels.append([])
        else:
            levels[-1].append(_axes(infos, f"{block}.residual.6.weight", 5)[0])
    if not all(levels):
        raise ValueError("its encoder has a level without blocks. Download it again.")
    base, in_channels = _axes(infos, "encoder.conv1.weight", 5)[:2]
    return {
        "base_dim": base,
        "z_dim": _latent_channels(infos, 16),
        "dim_mult": [widths[-1] // base for widths in levels],
        "num_res_blocks": len(levels[0]),
        "attn_scales": [],
        "temperal_downsample": has_time_conv,
        "in_channels": in_channels,
        "out_channels": _axes(infos, "decoder.head.2.weight", 5)[0],
        "scale_factor_temporal": 2 ** sum(has_time_conv),
        "scale_factor_spatial": 2 ** len(has_time_conv),
    }


def vae_2_2_config(infos: Infos) -> Config:
    """Arguments of `AutoencoderKLWan` for the Wan 2.2 VAE, nested residual levels."""
    base, in_channels = _axes(infos, "encoder.conv1.weight", 5)[:2]
    num_levels = _num_blocks(infos, "encoder.downsamples")
    level = "encoder.downsamples.{}.downsamples.{}"
    num_res_blocks = _num_blocks(infos, "encoder.downsamples.0.downsamples", "residual")
    widths = [
        _axes(infos, f"{level.format(i, num_res_blocks - 1)}.residual.6.weight", 5)[0]
        for i in range(num_levels)
    ]
    has_time_conv = [
        f"{level.format(i, num_res_blocks)}.time_conv.weight" in infos
        for i in range(num_levels - 1)
    ]
    patch = math.isqrt(in_channels // 3)
    return {
        "base_dim": base,
        "decoder_base_dim": _axes(infos, "decoder.conv1.weight", 5)[0] // (widths[-1] // base),
        "z_dim": _latent_channels(infos, 48),
        "dim_mult": [width // base for width in widths],
        "num_res_blocks": num_res_blocks,
        "attn_scales": [],
        "temperal_downsample": has_time_conv,
        "latents_mean": list(LATENTS_MEAN_2_2),
        "latents_std": list(LATENTS_STD_2_2),
        "is_residual": True,
        "in_channels": in_channels,
        "out_channels": _axes(infos, "decoder.head.2.weight", 5)[0],
        "patch_size": patch,
        "scale_factor_temporal": 2 ** sum(has_time_conv),
        "scale_factor_spatial": 2 ** (num_levels - 1) * patch,
    }


def _latent_channels(infos: Infos, expected: int) -> int:
    channels = _axes(infos, "conv2.weight", 5)[0]
    if channels != expected:
        raise ValueError(
            f"this VAE has {channels} latent channels; mean and spread of the latents are "
            f"published for {expected} only."
        )
    return channels


def t5_config(infos: Infos) -> Config:
    """Arguments of `UMT5Config`."""
    vocab, width = _axes(infos, "token_embedding.weight", 2)
    buckets, heads = _axes(infos, "blocks.0.pos_embedding.embedding.weight", 2)
    return {
        "vocab_size": vocab,
        "d_model": width,
        "d_kv": _axes(infos, "blocks.0.attn.q.weight", 2)[0] // heads,
        "d_ff": _axes(infos, "blocks.0.ffn.fc1.weight", 2)[0],
        "num_layers": _num_blocks(infos, "blocks"),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
    }


def clip_config(infos: Infos, num_heads: int | None = None) -> Config:
    """Arguments of `CLIPVisionConfig`; `num_heads` is needed where heads are not 80 wide."""
    width, _, patch, _ = _axes(infos, "visual.patch_embedding.weight", 4)
    tokens = _axes(infos, "visual.pos_embedding", 3)[1] - 1
    return {
        "hidden_size": width,
        "intermediate_size": _axes(infos, "visual.transformer.0.mlp.0.weight", 2)[0],
        "num_hidden_layers": _num_blocks(infos, "visual.transformer"),
        "num_attention_heads": _num_heads(width, num_heads, CLIP_HEAD_DIM, "Pass num_heads=."),
        "image_size": math.isqrt(tokens) * patch,
        "patch_size": patch,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
    }
