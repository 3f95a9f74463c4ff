"""Tiny random checkpoints in the original Wan layout, one per family of tasks.

Tensor names are written out here as the reference names them, apart from the rules under test.
"""

import itertools
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parent / "golden"
WIDTH, FFN, TEXT, FREQ, IMAGE = 24, 32, 32, 32, 80


def _linear(state, name, out, inside, bias=True):
    state[f"{name}.weight"] = torch.randn(out, inside) * inside**-0.5
    if bias:
        state[f"{name}.bias"] = torch.randn(out) * 0.1


def _norm(state, name, width, bias=True):
    state[f"{name}.weight"] = 1 + torch.randn(width) * 0.1
    if bias:
        state[f"{name}.bias"] = torch.randn(width) * 0.1


def _block(state, name, has_image):
    for attn in ("self_attn", "cross_attn"):
        for part in "qkvo":
            _linear(state, f"{name}.{attn}.{part}", WIDTH, WIDTH)
        for part in "qk":
            _norm(state, f"{name}.{attn}.norm_{part}", WIDTH, bias=False)
    if has_image:
        for part in ("k_img", "v_img"):
            _linear(state, f"{name}.cross_attn.{part}", WIDTH, WIDTH)
        _norm(state, f"{name}.cross_attn.norm_k_img", WIDTH, bias=False)
    _norm(state, f"{name}.norm3", WIDTH)
    _linear(state, f"{name}.ffn.0", FFN, WIDTH)
    _linear(state, f"{name}.ffn.2", WIDTH, FFN)
    state[f"{name}.modulation"] = torch.randn(1, 6, WIDTH) * 0.1


CHANNELS = {"t2v": 16, "i2v": 36, "flf2v": 36, "vace": 16}
CHANNELS |= {"t2v-2.2": 16, "i2v-2.2": 36, "vace-2.2": 16, "ti2v-2.2": 48}


def transformer_state(family, num_layers=1):
    """Original names and values of a tiny transformer; one head of 24."""
    has_image = family in ("i2v", "flf2v")
    latent = 48 if family == "ti2v-2.2" else 16
    state = {}
    state["patch_embedding.weight"] = torch.randn(WIDTH, CHANNELS[family], 1, 2, 2) * 0.1
    state["patch_embedding.bias"] = torch.zeros(WIDTH)
    for name, inside in (("text_embedding", TEXT), ("time_embedding", FREQ)):
        _linear(state, f"{name}.0", WIDTH, inside)
        _linear(state, f"{name}.2", WIDTH, WIDTH)
    _linear(state, "time_projection.1", 6 * WIDTH, WIDTH)
    for layer in range(num_layers):
        _block(state, f"blocks.{layer}", has_image)
    _linear(state, "head.head", latent * 4, WIDTH)
    state["head.modulation"] = torch.randn(1, 2, WIDTH) * 0.1
    if has_image:
        _norm(state, "img_emb.proj.0", IMAGE)
        _linear(state, "img_emb.proj.1", IMAGE, IMAGE)
        _linear(state, "img_emb.proj.3", WIDTH, IMAGE)
        _norm(state, "img_emb.proj.4", WIDTH)
    if family == "flf2v":
        state["img_emb.emb_pos"] = torch.randn(1, 10, IMAGE) * 0.1
    if family.startswith("vace"):
        _vace(state)
    return state


def _vace(state):
    state["vace_patch_embedding.weight"] = torch.randn(WIDTH, 96, 1, 2, 2) * 0.1
    state["vace_patch_embedding.bias"] = torch.zeros(WIDTH)
    _block(state, "vace_blocks.0", has_image=False)
    _linear(state, "vace_blocks.0.before_proj", WIDTH, WIDTH)
    _linear(state, "vace_blocks.0.after_proj", WIDTH, WIDTH)


def clip_state(num_layers=2, text_tower=True):
    """A tower of one 80-wide head on images of 28 pixels: 5 tokens."""
    state = {
        "visual.cls_embedding": torch.randn(1, 1, IMAGE),
        "visual.pos_embedding": torch.randn(1, 5, IMAGE),
        "visual.patch_embedding.weight": torch.randn(IMAGE, 3, 14, 14) * 0.05,
        "visual.head": torch.randn(IMAGE, 8),
    }
    _norm(state, "visual.pre_norm", IMAGE)
    _norm(state, "visual.post_norm", IMAGE)
    for layer in range(num_layers):
        name = f"visual.transformer.{layer}"
        _norm(state, f"{name}.norm1", IMAGE)
        _norm(state, f"{name}.norm2", IMAGE)
        _linear(state, f"{name}.attn.to_qkv", 3 * IMAGE, IMAGE)
        _linear(state, f"{name}.attn.proj", IMAGE, IMAGE)
        _linear(state, f"{name}.mlp.0", 2 * IMAGE, IMAGE)
        _linear(state, f"{name}.mlp.2", IMAGE, 2 * IMAGE)
    if text_tower:
        state["log_scale"] = torch.tensor(2.0)
        state["textual.token_embedding.weight"] = torch.randn(7, 4)
    return state


def _residual(state, name, inside, out):
    state[f"{name}.residual.0.gamma"] = torch.ones(inside, 1, 1, 1)
    _conv(state, f"{name}.residual.2", out, inside, 3, 3, 3)
    state[f"{name}.residual.3.gamma"] = torch.ones(out, 1, 1, 1)
    _conv(state, f"{name}.residual.6", out, out, 3, 3, 3)
    if inside != out:
        _conv(state, f"{name}.shortcut", out, inside, 1, 1, 1)


def _conv(state, name, out, inside, *kernel):
    scale = (inside * torch.Size(kernel).numel()) ** -0.5
    state[f"{name}.weight"] = torch.randn(out, inside, *kernel) * scale
    state[f"{name}.bias"] = torch.zeros(out)


def _ends(state, side, width, first, last):
    _conv(state, f"{side}.conv1", first[0], first[1], 3, 3, 3)
    for block in (0, 2):
        _residual(state, f"{side}.middle.{block}", width, width)
    state[f"{side}.middle.1.norm.gamma"] = torch.ones(width, 1, 1)
    _conv(state, f"{side}.middle.1.to_qkv", 3 * width, width, 1, 1)
    _conv(state, f"{side}.middle.1.proj", width, width, 1, 1)
    state[f"{side}.head.0.gamma"] = torch.ones(last[1], 1, 1, 1)
    _conv(state, f"{side}.head.2", last[0], last[1], 3, 3, 3)


def vae_2_2_state(base=8, decoder_base=8):
    """A tiny Wan 2.2 VAE: 48 latent channels, 4 levels, time halved in the last two."""
    state, mult, has_time = {}, (1, 2, 4, 4), (False, True, True)
    widths = [base, *(base * m for m in mult)]
    _ends(state, "encoder", widths[-1], (base, 12), (96, widths[-1]))
    for level, (inside, out) in enumerate(itertools.pairwise(widths)):
        name = f"encoder.downsamples.{level}.downsamples"
        _residual(state, f"{name}.0", inside, out)
        _residual(state, f"{name}.1", out, out)
        if level < 3:
            _conv(state, f"{name}.2.resample.1", out, out, 3, 3)
            if has_time[level]:
                _conv(state, f"{name}.2.time_conv", out, out, 3, 1, 1)
    widths = [decoder_base * m for m in (mult[-1], *mult[::-1])]
    _ends(state, "decoder", widths[0], (widths[0], 48), (12, widths[-1]))
    for level, (inside, out) in enumerate(itertools.pairwise(widths)):
        name = f"decoder.upsamples.{level}.upsamples"
        _residual(state, f"{name}.0", inside, out)
        _residual(state, f"{name}.1", out, out)
        _residual(state, f"{name}.2", out, out)
        if level < 3:
            _conv(state, f"{name}.3.resample.1", out, out, 3, 3)
            if has_time[::-1][level]:
                _conv(state, f"{name}.3.time_conv", 2 * out, out, 3, 1, 1)
    _conv(state, "conv1", 96, 96, 1, 1, 1)
    _conv(state, "conv2", 48, 48, 1, 1, 1)
    return state


def vae_state(base=2):
    """A tiny Wan 2.1 VAE: the levels' blocks in one flat list."""
    state, mult, has_time = {}, (1, 2, 4, 4), (False, True, True)
    widths = [base, *(base * m for m in mult)]
    _ends(state, "encoder", widths[-1], (base, 3), (32, widths[-1]))
    index = 0
    for level, (inside, out) in enumerate(itertools.pairwise(widths)):
        for width in (inside, out):
            _residual(state, f"encoder.downsamples.{index}", width, out)
            index += 1
        if level < 3:
            _conv(state, f"encoder.downsamples.{index}.resample.1", out, out, 3, 3)
            if has_time[level]:
                _conv(state, f"encoder.downsamples.{index}.time_conv", out, out, 3, 1, 1)
            index += 1
    widths = [base * m for m in (mult[-1], *mult[::-1])]
    _ends(state, "decoder", widths[0], (widths[0], 16), (3, widths[-1]))
    index = 0
    for level, (before, out) in enumerate(itertools.pairwise(widths)):
        # Up-sampling halves the channels, so levels after the first take half of the one before.
        inside = before if level == 0 else before // 2
        for width in (inside, out, out):
            _residual(state, f"decoder.upsamples.{index}", width, out)
            index += 1
        if level < 3:
            _conv(state, f"decoder.upsamples.{index}.resample.1", out // 2, out, 3, 3)
            if has_time[::-1][level]:
                _conv(state, f"decoder.upsamples.{index}.time_conv", 2 * out, out, 3, 1, 1)
            index += 1
    _conv(state, "conv1", 32, 32, 1, 1, 1)
    _conv(state, "conv2", 16, 16, 1, 1, 1)
    return state


def write_transformer(folder, family, num_layers=1, num_shards=1, **config):
    """One transformer with its config.json, split into shards with an index if asked."""
    folder.mkdir(parents=True, exist_ok=True)
    state = transformer_state(family, num_layers)
    kind = family.removesuffix("-2.2")
    values = {"_class_name": "WanModel", "model_type": kind, "num_heads": 1, "text_len": 512}
    if kind == "vace":
        values["vace_layers"] = [0]
    (folder / "config.json").write_text(json.dumps(values | config))
    stem = "diffusion_pytorch_model"
    if num_shards == 1:
        save_file(state, folder / f"{stem}.safetensors")
        return state
    names = sorted(state)
    weight_map = {}
    for shard in range(num_shards):
        file = f"{stem}-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {name: state[name] for name in names[shard::num_shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    return state


def write_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)


def write_checkpoint(folder, family, **options):
    """A whole original checkpoint of ``family``; the text encoder is the recorded one."""
    torch.manual_seed(7)
    if family in ("t2v-2.2", "i2v-2.2", "vace-2.2"):
        for expert in ("high_noise_model", "low_noise_model"):
            write_transformer(folder / expert, family, **options)
    else:
        write_transformer(folder, family, **options)
    t5 = load_file(GOLDEN / "t5_a_weights_bf16.safetensors")
    torch.save(t5, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    if family == "ti2v-2.2":
        torch.save(vae_2_2_state(), folder / "Wan2.2_VAE.pth")
    else:
        torch.save(vae_state(), folder / "Wan2.1_VAE.pth")
    write_tokenizer(folder / "google" / "umt5-xxl")
    if family in ("i2v", "flf2v"):
        name = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
        torch.save(clip_state(), folder / name)
    return folder
