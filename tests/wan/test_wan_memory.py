"""The memory formula against tensors alive in small models; the table of the docs."""

from pathlib import Path

import pytest
import torch
from live_memory import measure_peak

import tiny_wan
from nabla_attn.wan import memory
from nabla_attn.wan.parts import KINDS, load_part


def make_transformer(width, ffn, heads, dtype):
    config = {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "ffn_dim": ffn,
        "num_layers": 2,
        "text_dim": 32,
        "freq_dim": 32,
    }
    return KINDS["transformer"].build(config).to_empty(device="cpu").to(dtype)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("width", "ffn", "heads"), [(192, 192, 2), (96, 560, 8), (160, 432, 4)])
def test_activations(width, ffn, heads, dtype):
    model = make_transformer(width, ffn, heads, dtype)
    latent, text = torch.zeros(1, 16, 3, 32, 40, dtype=dtype), torch.zeros(1, 32, 32, dtype=dtype)
    measured = measure_peak(lambda: model(latent, torch.tensor([5.0]), text))
    expected = memory.activation_bytes(3 * 16 * 20, width, ffn, heads, dtype.itemsize)
    assert expected == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("is_2_2", [False, True])
@pytest.mark.parametrize("frames", [9, 13])
def test_decoding(tmp_path, is_2_2, frames):
    state = tiny_wan.vae_2_2_state(8, 8) if is_2_2 else tiny_wan.vae_state(6)
    name = "Wan2.2_VAE.pth" if is_2_2 else "Wan2.1_VAE.pth"
    torch.save(state, tmp_path / name)
    vae = load_part("Wan 2.2 VAE" if is_2_2 else "VAE", tmp_path / name)
    latent = torch.zeros(1, 48 if is_2_2 else 16, (frames - 1) // 4 + 1, 5, 7)
    height, width = (80, 112) if is_2_2 else (40, 56)
    measured = measure_peak(lambda: vae.decode(latent))
    base = 8 if is_2_2 else 6
    expected = memory.vae_bytes(base, height, width, frames, is_2_2=is_2_2)
    assert expected == pytest.approx(measured, rel=0.1)


def test_weights_of_the_released_models():
    billions = {name: memory.count_parameters(m) / 1e9 for name, m in memory.MODELS.items()}
    assert billions["t2v-1.3B"] == pytest.approx(1.42, abs=0.01)
    assert billions["t2v-14B"] == pytest.approx(14.29, abs=0.01)
    assert billions["i2v-14B"] == pytest.approx(16.40, abs=0.02)
    assert billions["ti2v-5B"] == pytest.approx(5.00, abs=0.02)


def test_other_parts_of_the_released_models():
    from nabla_attn.wan.shapes import LATENTS_MEAN_2_2, LATENTS_STD_2_2

    text = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24}
    text |= {"num_heads": 64, "feed_forward_proj": "gated-gelu"}
    clip = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
    clip |= {"num_attention_heads": 16, "image_size": 224, "patch_size": 14}
    vae_2_2 = {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True}
    vae_2_2 |= {"in_channels": 12, "out_channels": 12, "patch_size": 2}
    vae_2_2 |= {"latents_mean": LATENTS_MEAN_2_2, "latents_std": LATENTS_STD_2_2}
    for kind, config, count in [
        ("text encoder", text, memory.TEXT_ENCODER),
        ("image encoder", clip, memory.IMAGE_ENCODER),
        ("VAE", {}, memory.VAE),
        ("Wan 2.2 VAE", vae_2_2, memory.VAE_2_2),
    ]:
        part = KINDS[kind]
        parameters = part.build(config).named_parameters()
        assert sum(p.numel() for name, p in parameters if name not in part.ties) == count, kind


def test_the_table_of_the_docs_is_the_formula_s():
    page = (Path(__file__).parents[2] / "docs" / "wan.md").read_text(encoding="utf-8")
    assert memory.memory_table() in page


def test_unknown_model():
    with pytest.raises(ValueError, match=r"unknown task 't2v-2B'. Known: t2v-1.3B"):
        memory.estimate("t2v-2B", 832, 480, 81)


def ask(capsys, *arguments):
    from nabla_attn.cli import app

    with pytest.raises(SystemExit) as ended:
        app(["info", *arguments])
    said = capsys.readouterr()
    return ended.value.code, " ".join((said.out + said.err).split())


def test_info_tells_what_a_video_needs(capsys):
    code, said = ask(capsys, "--memory", "t2v-14B", "1280*720")
    assert code == 0
    page = (Path(__file__).parents[2] / "docs" / "wan.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith("| t2v-14B | 1280x720x81"))
    cells = [cell.strip() for cell in row.split("|")]
    assert f"transformer {cells[3]} GiB" in said and f"peak with both {cells[9]} GiB" in said
    assert f"smallest card {cells[11]}" in said
    _, fewer = ask(capsys, "--memory", "t2v-14B", "1280*720", "--frames", "41")
    assert "41 frames" in fewer and fewer != said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "t2v-2B", "1280*720"], "unknown task 't2v-2B'. Known: t2v-1.3B"),
        (["--memory", "ti2v-5B", "1280*720"], "height must be a multiple of 32 for ti2v-5B"),
        (["--memory", "t2v-14B", "big"], "size must be WIDTH*HEIGHT"),
        (["--memory", "t2v-14B", "1280*720", "--frames", "6"], "frames must be 4n+1, got 6"),
        (["--frames", "5"], "Pass --memory TASK SIZE too"),
    ],
)
def test_info_of_what_no_model_takes(capsys, arguments, message):
    code, said = ask(capsys, *arguments)
    assert code == 2 and message in said
