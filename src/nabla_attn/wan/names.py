"""Names of the original checkpoints beside those of diffusers and transformers, as data.

Sources: Wan2.1 `wan/modules/{t5,clip,vae}.py` and Wan2.2 `wan/modules/vae2_2.py` for the left
column; `UMT5EncoderModel`, `CLIPVisionModel` and `AutoencoderKLWan` for the right one.
The transformer and the Wan 2.1 VAE use diffusers' own converters.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """One row: a name that matches `pattern` becomes `targets`.

    Several targets share the tensor in equal pieces along its first axis; none drops it.
    """

    pattern: str
    targets: tuple[str, ...]


def _rows(*rows: tuple[str, ...]) -> tuple[Rule, ...]:
    return tuple(Rule(row[0], row[1:]) for row in rows)


T5_RULES = _rows(
    (r"token_embedding\.weight", "shared.weight"),
    (r"norm\.weight", "encoder.final_layer_norm.weight"),
    (r"blocks\.(\d+)\.norm1\.weight", r"encoder.block.\1.layer.0.layer_norm.weight"),
    (
        r"blocks\.(\d+)\.attn\.([qkvo])\.weight",
        r"encoder.block.\1.layer.0.SelfAttention.\2.weight",
    ),
    (
        r"blocks\.(\d+)\.pos_embedding\.embedding\.weight",
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    (r"blocks\.(\d+)\.norm2\.weight", r"encoder.block.\1.layer.1.layer_norm.weight"),
    (
        r"blocks\.(\d+)\.ffn\.gate\.0\.weight",
        r"encoder.block.\1.layer.1.DenseReluDense.wi_0.weight",
    ),
    (r"blocks\.(\d+)\.ffn\.fc1\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wi_1.weight"),
    (r"blocks\.(\d+)\.ffn\.fc2\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wo.weight"),
)

CLIP_RULES = _rows(
    (r"visual\.cls_embedding", "embeddings.class_embedding"),
    (r"visual\.pos_embedding", "embeddings.position_embedding.weight"),
    (r"visual\.patch_embedding\.weight", "embeddings.patch_embedding.weight"),
    (r"visual\.pre_norm\.(weight|bias)", r"pre_layrnorm.\1"),
    (r"visual\.post_norm\.(weight|bias)", r"post_layernorm.\1"),
    (r"visual\.transformer\.(\d+)\.norm([12])\.(\w+)", r"encoder.layers.\1.layer_norm\2.\3"),
    (
        r"visual\.transformer\.(\d+)\.attn\.to_qkv\.(\w+)",
        r"encoder.layers.\1.self_attn.q_proj.\2",
        r"encoder.layers.\1.self_attn.k_proj.\2",
        r"encoder.layers.\1.self_attn.v_proj.\2",
    ),
    (r"visual\.transformer\.(\d+)\.attn\.proj\.(\w+)", r"encoder.layers.\1.self_attn.out_proj.\2"),
    (r"visual\.transformer\.(\d+)\.mlp\.0\.(\w+)", r"encoder.layers.\1.mlp.fc1.\2"),
    (r"visual\.transformer\.(\d+)\.mlp\.2\.(\w+)", r"encoder.layers.\1.mlp.fc2.\2"),
    # Image-to-video uses the tower's features before its head; the text half is never run.
    (r"visual\.head(\.\w+)?",),
    (r"(textual|text_model)\..*",),
    (r"log(it)?_scale",),
)

_RESIDUAL = (
    (0, "norm1", "gamma"),
    (2, "conv1", r"(weight|bias)"),
    (3, "norm2", "gamma"),
    (6, "conv2", r"(weight|bias)"),
)


def _residual_rows(old: str, new: str, groups: int) -> tuple[Rule, ...]:
    """Rows of one residual block; `groups` capture groups come before its own."""
    rows = []
    for index, name, leaf in _RESIDUAL:
        tail = rf"\{groups + 1}" if leaf.startswith("(") else leaf
        rows.append(Rule(rf"{old}\.residual\.{index}\.{leaf}", (f"{new}.{name}.{tail}",)))
    rows.append(Rule(rf"{old}\.shortcut\.(weight|bias)", (rf"{new}.conv_shortcut.\{groups + 1}",)))
    return tuple(rows)


def _side_rows(side: str, old: str, new: str, resampler: str) -> tuple[Rule, ...]:
    """Rows of the encoder or decoder of the Wan 2.2 VAE."""
    level = rf"{side}\.{old}\.(\d+)\.{old}\.(\d+)"
    middle = rf"{side}\.middle"
    resample = rf"{side}.{new}.\1.{resampler}"
    return (
        Rule(rf"{side}\.conv1\.(\w+)", (rf"{side}.conv_in.\1",)),
        *_residual_rows(level, rf"{side}.{new}.\1.resnets.\2", 2),
        Rule(rf"{level}\.resample\.1\.(\w+)", (rf"{resample}.resample.1.\3",)),
        Rule(rf"{level}\.time_conv\.(\w+)", (rf"{resample}.time_conv.\3",)),
        *_residual_rows(rf"{middle}\.0", f"{side}.mid_block.resnets.0", 0),
        Rule(rf"{middle}\.1\.(.+)", (rf"{side}.mid_block.attentions.0.\1",)),
        *_residual_rows(rf"{middle}\.2", f"{side}.mid_block.resnets.1", 0),
        Rule(rf"{side}\.head\.0\.gamma", (f"{side}.norm_out.gamma",)),
        Rule(rf"{side}\.head\.2\.(\w+)", (rf"{side}.conv_out.\1",)),
    )


VAE_2_2_RULES = (
    *_side_rows("encoder", "downsamples", "down_blocks", "downsampler"),
    *_side_rows("decoder", "upsamples", "up_blocks", "upsampler"),
    *_rows(
        (r"conv1\.(\w+)", r"quant_conv.\1"),
        (r"conv2\.(\w+)", r"post_quant_conv.\1"),
    ),
)

Moves = dict[str, tuple[str, ...]]
"""Old names to new ones, several where a tensor is split."""


def strip_prefix(name: str) -> str:
    """`name` without the prefix that single-file exports put before it."""
    return name.removeprefix("model.diffusion_model.").removeprefix("diffusion_model.")


def move_by_rules(names: Iterable[str], rules: tuple[Rule, ...]) -> Moves:
    """New names by the first row that matches the whole old one; other names stay."""
    moves: Moves = {}
    for name in names:
        moves[name] = (name,)
        for rule in rules:
            match = re.fullmatch(rule.pattern, name)
            if match:
                moves[name] = tuple(match.expand(target) for target in rule.targets)
                break
    return moves


def move_by_converter(names: Iterable[str], converter: Callable[[dict], dict]) -> Moves:
    """New names by one of diffusers' converters, which rename and do nothing else.

    Running the converter on the names themselves gives the map without any tensor.
    """
    return {old: (new,) for new, old in converter({name: name for name in names}).items()}


def move_transformer(names: Iterable[str]) -> Moves:
    """Names of a Wan transformer, by diffusers' converter and one row that it lacks."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    # FLF2V only: positions of the two image token groups (Wan2.1 model.py, MLPProj.emb_pos).
    extra = {"img_emb.emb_pos": ("condition_embedder.image_embedder.pos_embed",)}
    names = set(names)
    moves = move_by_converter(names - extra.keys(), convert_wan_transformer_to_diffusers)
    return moves | {name: extra[name] for name in extra.keys() & names}


def move_vae(names: Iterable[str]) -> Moves:
    """Names of the Wan 2.1 VAE, by diffusers' converter."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    return move_by_converter(names, convert_wan_vae_to_diffusers)


def move_vae_2_2(names: Iterable[str]) -> Moves:
    """Names of the Wan 2.2 VAE."""
    return move_by_rules(names, VAE_2_2_RULES)


def move_t5(names: Iterable[str]) -> Moves:
    """Names of the umT5 encoder."""
    return move_by_rules(names, T5_RULES)


def move_clip(names: Iterable[str]) -> Moves:
    """Names of the CLIP image tower."""
    return move_by_rules(names, CLIP_RULES)
