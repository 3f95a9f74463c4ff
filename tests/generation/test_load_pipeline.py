import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from nabla_attn.generation.memory import hollow_pipeline
from nabla_attn.generation.pipeline import (
    load_pipeline,
    model_directory,
    model_identity,
    model_name,
)
from nabla_attn.generation.placement import resolve_device, resolve_dtype
from nabla_attn.moving_shapes.loop import autocast

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def broken(tiny_wan, tmp_path):
    return shutil.copytree(tiny_wan, tmp_path / "model")


def fails(directory, *parts):
    with pytest.raises(ValueError) as caught:
        load_pipeline(directory, device="cpu", dtype="float32")
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_loads_with_the_vae_in_float32(tiny_wan):
    pipeline = load_pipeline(tiny_wan, device="cpu", dtype="bfloat16")
    assert pipeline.vae.dtype == torch.float32
    assert pipeline.text_encoder.dtype == torch.bfloat16
    assert pipeline.transformer.dtype == torch.bfloat16
    assert not pipeline.transformer.training
    assert model_name(pipeline) == str(tiny_wan)


def test_no_directory(tmp_path):
    fails(tmp_path / "nowhere", "model directory not found", "nowhere")
    fails(tmp_path, "model_index.json")


def test_broken_index(broken):
    index = broken / "model_index.json"
    whole = index.read_text()
    for text in ("{", "[]", "{}", '{"_class_name": ["a", "b"]}'):
        index.write_text(text)
        fails(broken, "model_index.json")
    index.write_text(whole)
    change_json(index, _class_name="NoSuchPipeline")
    fails(broken, "NoSuchPipeline")
    index.write_text(whole)
    change_json(index, vae=["my_code", "Model"])
    fails(broken, "my_code", "only diffusers and transformers")
    index.write_text(whole)
    change_json(index, **{"../vae": ["diffusers", "AutoencoderKLWan"]})
    fails(broken, "../vae")


def test_hidden_entries_are_not_loaded(broken, tmp_path, monkeypatch):
    (tmp_path / "my_code.py").write_text("raise SystemExit('this code ran')")
    monkeypatch.syspath_prepend(tmp_path)
    for entry in (["my_code", "Model"], []):
        change_json(broken / "model_index.json", _x=entry)
        load_pipeline(broken, device="cpu", dtype="float32")


def test_trained_further_is_another_model(tiny_wan, broken):
    first, same = (
        model_identity(load_pipeline(path, device="cpu", dtype="float32"))
        for path in (tiny_wan, broken)
    )
    assert first["model_files"] == same["model_files"] and first["dtype"] == "float32"
    path = broken / "transformer" / WEIGHTS
    tensors = load_file(path)
    save_file({name: x + 1 for name, x in tensors.items()}, path, metadata={"format": "pt"})
    changed = model_identity(load_pipeline(broken, device="cpu", dtype="float32"))
    assert changed["model_files"] != first["model_files"]


def test_a_missing_part(broken):
    shutil.rmtree(broken / "vae")
    fails(broken, str(broken / "vae"), "missing")


def test_truncated_weights(broken):
    path = broken / "transformer" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])
    fails(broken, str(path), "truncated")
    path.write_bytes(b"\xff" * 64)
    fails(broken, str(path))
    path.unlink()
    fails(broken, str(broken / "transformer"), "no .safetensors")


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("transformer", {"num_layers": 3}, "missing from the weights"),
        ("transformer", {"num_layers": 1}, "unknown to the config"),
        ("transformer", {"ffn_dim": 48}, "transformer"),
        ("transformer", {"num_layers": "many"}, "transformer"),
        ("vae", {"base_dim": 12}, "vae"),
        ("text_encoder", {"d_ff": 48}, "text_encoder"),
        ("text_encoder", {"num_layers": 2}, "text_encoder"),
    ],
)
def test_config_that_does_not_match(broken, part, changes, words):
    change_json(broken / part / "config.json", **changes)
    fails(broken, str(broken / part), words)


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("transformer", {"num_layers": 10**9}),
        ("vae", {"num_res_blocks": 10**9}),
        ("vae", {"dim_mult": [1] * 5000}),
        ("text_encoder", {"num_layers": 10**9}),
        ("text_encoder", {"text_config": {"num_hidden_layers": 1e18}}),
    ],
)
def test_layers_without_number_are_refused_before_they_are_built(broken, part, changes):
    change_json(broken / part / "config.json", **changes)
    fails(broken, str(broken / part / "config.json"), "the weights have fewer")
    if part != "text_encoder":
        with pytest.raises(ValueError, match="the weights have fewer"):
            hollow_pipeline(broken)


def test_a_swapped_tensor(broken):
    path = broken / "transformer" / WEIGHTS
    tensors = load_file(path)
    tensors["scale_shift_table"] = torch.zeros(3)
    save_file(tensors, path, metadata={"format": "pt"})
    fails(broken, str(broken / "transformer"), "scale_shift_table")


def test_an_index_may_not_leave_its_folder(broken):
    folder = broken / "transformer"
    (folder / f"{WEIGHTS}.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"a": "../../secret.safetensors"}})
    )
    fails(broken, "../../secret.safetensors")


def test_pickled_weights_are_not_read(broken):
    (broken / "transformer" / WEIGHTS).unlink()
    torch.save({}, broken / "transformer" / "diffusion_pytorch_model.bin")
    fails(broken, "no .safetensors")


def test_broken_tokenizer_and_scheduler(broken):
    (broken / "tokenizer" / "tokenizer.json").write_text("{")
    fails(broken, str(broken / "tokenizer"))


def test_devices_and_dtypes():
    assert resolve_device("cpu").type == "cpu"
    assert resolve_dtype("float16", torch.device("cpu")) == torch.float16
    assert resolve_dtype("auto", torch.device("cpu")) in (torch.float32, torch.bfloat16)
    for name in ("gpu", "cuda:99", "meta!"):
        with pytest.raises(ValueError, match="cannot be used here"):
            resolve_device(name)
    with pytest.raises(ValueError, match=r"unknown dtype 'int8'\. Known: auto, float32"):
        resolve_dtype("int8", torch.device("cpu"))


@pytest.mark.parametrize(
    ("features", "dtype"),
    [
        ({"avx2": True, "avx512_f": True}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ({}, torch.float32),
    ],
)
def test_a_cpu_computes_in_bfloat16_only_where_it_has_instructions(monkeypatch, features, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    device = torch.device("cpu")
    assert resolve_dtype("auto", device) == dtype
    with autocast(device):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == dtype


def test_builtin_is_a_directory_or_says_how_to_get_one(monkeypatch, tmp_path):
    monkeypatch.setattr("nabla_attn.generation.pipeline.BUILTIN_DIRECTORY", tmp_path)
    with pytest.raises(ValueError, match="nabla train"):
        model_directory("builtin")
