"""LPIPS, CLIP, motion, and lists of prompts."""

import shutil

import numpy as np
import pytest
import torch

from nabla_attn.evaluation.metrics import measure_motion
from nabla_attn.evaluation.perception import (
    CONVOLUTIONS,
    LPIPS,
    SCALE,
    SHIFT,
    ClipScore,
    measure_lpips,
)
from nabla_attn.evaluation.prompts import make_items, read_prompts, take_prompts
from nabla_attn.moving_shapes.judge import MovingShapesScorer


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights under the names of the lpips package."""
    torch.manual_seed(0)
    state = {}
    for index, (name, inner, outer, kernel, *_) in enumerate(CONVOLUTIONS):
        state[f"net.{name}.weight"] = (
            torch.randn(outer, inner, kernel, kernel) / kernel / inner**0.5
        )
        state[f"net.{name}.bias"] = torch.zeros(outer)
        state[f"lin{index}.model.1.weight"] = torch.rand(1, outer, 1, 1)
    path = tmp_path_factory.mktemp("lpips") / "alex.pt"
    torch.save(state, path)
    return path


def test_lpips_gets_pictures_in_minus_one_to_one(weights):
    # Fed [0, 1] or [0, 255] it gives plausible, wrong numbers (a silent error seen elsewhere).
    model, seen = LPIPS(weights), []
    model.convolutions[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    black, white = (np.full((1, 64, 64, 3), value, np.uint8) for value in (0, 255))
    measure_lpips(model, black, white)
    for picture, value in zip(seen, (-1, 1), strict=True):
        expected = [(value - shift) / scale for shift, scale in zip(SHIFT, SCALE, strict=True)]
        assert picture[0, :, 5, 5].tolist() == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match=r"pictures in \[-1, 1\]"):
        model(torch.full((1, 3, 64, 64), 255.0), torch.zeros(1, 3, 64, 64))


def test_lpips_by_hand(weights):
    model = LPIPS(weights)
    a, b = noise(3, 70, 64, 3), noise(3, 70, 64, 3, seed=1)
    assert measure_lpips(model, a, a) == pytest.approx([0, 0, 0], abs=1e-7)
    state = torch.load(weights, weights_only=True)
    x, y = (torch.tensor(v[1]).permute(2, 0, 1)[None].float() / 127.5 - 1 for v in (a, b))
    total = 0.0
    for index, (name, _, _, _, stride, padding) in enumerate(CONVOLUTIONS):
        if index == 0:
            scale = torch.tensor(SCALE)[:, None, None]
            x, y = ((v - torch.tensor(SHIFT)[:, None, None]) / scale for v in (x, y))
        x, y = (
            torch.conv2d(
                torch.max_pool2d(v, 3, 2) if index in (1, 2) else v,
                state[f"net.{name}.weight"], state[f"net.{name}.bias"], stride, padding,
            ).relu()
            for v in (x, y)
        )  # fmt: skip
        unit = [v / (v.norm(dim=1, keepdim=True) + 1e-10) for v in (x, y)]
        lin = state[f"lin{index}.model.1.weight"]
        total += (lin * (unit[0] - unit[1]) ** 2).sum(1).mean().item()
    assert measure_lpips(model, a, b)[1] == pytest.approx(total, rel=1e-4)
    with pytest.raises(ValueError, match="63 pixels"):
        measure_lpips(model, a[:, :40], b[:, :40])


def test_other_weights_are_refused(tmp_path):
    torch.save({"net.slice1.0.weight": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt: not the weights"):
        LPIPS(tmp_path / "w.pt")


@pytest.fixture(scope="module")
def clip_directory(tmp_path_factory):
    from tests.tiny_diffusers import tiny_tokenizer
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    small["num_attention_heads"] = 2
    tokenizer = tiny_tokenizer()
    text = small | {"vocab_size": len(tokenizer), "eos_token_id": 1, "bos_token_id": 0}
    config = CLIPConfig(
        text_config=text, vision_config=small | {"image_size": 32, "patch_size": 8},
        projection_dim=8,
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_clip_score(clip_directory, monkeypatch):
    import transformers

    monkeypatch.setattr(transformers, "CLIPTokenizerFast", transformers.PreTrainedTokenizerFast)
    score = ClipScore(clip_directory)
    frames = noise(3, 48, 64, 3)
    value = score(frames, "a red circle")
    assert -100 <= value <= 100
    assert score(np.repeat(frames[:1], 2, 0), "a red circle") == pytest.approx(
        score(frames[:1], "a red circle"), abs=1e-3
    )
    prepared = score.prepare(np.full((1, 48, 64, 3), 255, np.uint8))
    assert prepared.shape == (1, 3, 32, 32)
    assert prepared[0, 0, 3, 3].item() == pytest.approx((1 - 0.48145466) / 0.26862954, rel=1e-4)
    with pytest.raises(ValueError, match="cannot load a CLIP"):
        ClipScore(clip_directory / "nothing")


@pytest.mark.parametrize(
    "text", ["[]", '{"image_mean": 3}', '{"image_std": ["a", "b", "c"]}', '{"image_mean": [1, 2]}']
)
def test_means_that_are_none_are_refused(clip_directory, tmp_path, monkeypatch, text):
    import shutil

    import transformers

    monkeypatch.setattr(transformers, "CLIPTokenizerFast", transformers.PreTrainedTokenizerFast)
    folder = shutil.copytree(clip_directory, tmp_path / "clip")
    (folder / "preprocessor_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: expected"):
        ClipScore(folder)


def test_clip_computes_in_fp32_whatever_its_weights_are_stored_in(
    clip_directory, tmp_path, monkeypatch
):
    import transformers

    monkeypatch.setattr(transformers, "CLIPTokenizerFast", transformers.PreTrainedTokenizerFast)
    short, long = (shutil.copytree(clip_directory, tmp_path / name) for name in ("short", "long"))
    model = transformers.CLIPModel.from_pretrained(clip_directory).bfloat16()
    model.save_pretrained(short)
    model.float().save_pretrained(long)
    frames = noise(3, 48, 64, 3)
    assert ClipScore(short)(frames, "a red circle") == ClipScore(long)(frames, "a red circle")


def test_motion_of_a_still_error_is_perfect():
    video = noise(4, 24, 24, 3) // 2
    shifted = video + 10
    assert measure_motion(shifted, video)["motion_psnr"] is None
    assert measure_motion(shifted, video)["motion_ssim"] == pytest.approx(1)
    flicker = video.copy()
    flicker[1::2] += 10  # every difference is wrong by 10, with alternating sign
    assert measure_motion(flicker, video)["motion_psnr"] == pytest.approx(28.1308, abs=1e-3)
    assert measure_motion(video[:1], video[:1]) == {"motion_psnr": None, "motion_ssim": None}
    with pytest.raises(ValueError, match="one shape"):
        measure_motion(video, video[:2])


def test_prompts(tmp_path):
    world = MovingShapesScorer()
    (tmp_path / "a.txt").write_text("one\n\ntwo\none\n")
    assert read_prompts(tmp_path / "a.txt") == ["one", "two"]
    (tmp_path / "a.json").write_text('[{"prompt_en": "one", "dimension": []}, "two"]')
    assert read_prompts(tmp_path / "a.json") == ["one", "two"]
    assert take_prompts(tmp_path / "a.json", None, world) == ["one", "two"]
    assert take_prompts(tmp_path / "a.json", 1, world) == ["one"]
    assert take_prompts(None, None, world) == world.prompts(4)
    assert take_prompts(None, 2, world) == world.prompts(2)
    for wrong in ("[]", '{"a": 1}', '[{"prompt_en": ["one"]}]', '[{"prompt_en": 5}]', "[[]]"):
        (tmp_path / "b.json").write_text(wrong)
        with pytest.raises(ValueError, match=r"b\.json"):
            read_prompts(tmp_path / "b.json")
    (tmp_path / "c.txt").write_text('\ufeffone\n# a remark\n{"prompt": "two"}\n')
    assert read_prompts(tmp_path / "c.txt") == ["one", "two"]
    (tmp_path / "d.txt").write_text('{"prompt": "two", "seed": 1}\n')
    with pytest.raises(ValueError, match="--seeds"):
        read_prompts(tmp_path / "d.txt")
    assert [item.name for item in make_items(["a", "b"], [0, 7])] == [
        "p0000-s0", "p0000-s7", "p0001-s0", "p0001-s7",
    ]  # fmt: skip
    for arguments in (([], [0]), (["a"], []), (["a", "a"], [0]), (["a"], [1, 1])):
        with pytest.raises(ValueError, match=r"nothing to evaluate|given twice"):
            make_items(*arguments)
