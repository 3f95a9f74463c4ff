"""Where a pipeline computes, and models by their ids."""

import shutil
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from nabla_attn.generation.generate import generate
from nabla_attn.generation.pipeline import load_pipeline, model_identity
from nabla_attn.generation.placement import QUANTIZERS, Placement, resolve_dtype
from nabla_attn.generation.request import GenerationRequest

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("asked", "device", "message"),
    [
        ({"offload": "disk"}, "cuda", "unknown --offload 'disk'. Known: model, sequential, group"),
        (
            {"offload": "model"},
            "cpu",
            "keeps parts on the CPU .* pass --device cuda",
        ),
        ({"quantize": "int3"}, "cpu", "unknown --quantize 'int3'. Known: int8, nf4, torchao"),
        ({"quantize": "nowhere.gguf"}, "cpu", "nowhere.gguf: there is no such file"),
    ],
)
def test_what_cannot_be_is_refused_before_loading(asked, device, message):
    with pytest.raises(ValueError, match=message):
        Placement(**asked).check(torch.device(device))


@pytest.mark.parametrize("name", ["int8", "nf4", "torchao"])
def test_a_missing_package_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, QUANTIZERS[name], None)
    with pytest.raises(ValueError, match="pip install"):
        Placement(quantize=name).check(torch.device("cuda"))


class Config(dict):
    """Takes the place of a configuration of diffusers, which asks for its package."""


@pytest.mark.parametrize(
    ("asked", "name", "values"),
    [
        ("int8", "BitsAndBytesConfig", {"load_in_8bit": True}),
        (
            "nf4",
            "BitsAndBytesConfig",
            {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_compute_dtype": torch.bfloat16,
            },
        ),
        ("w.gguf", "GGUFQuantizationConfig", {"compute_dtype": torch.bfloat16}),
    ],
)
def test_quantization_is_what_diffusers_has(asked, name, values, monkeypatch):
    import diffusers

    monkeypatch.setattr(diffusers, name, Config)
    assert Placement(quantize=asked).quantization(torch.bfloat16) == values


def test_a_file_that_is_no_gguf_is_named(tiny_wan, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", sys.modules.get("gguf", ModuleType("gguf")))
    file = tmp_path / "w.gguf"
    file.write_bytes(b"words" * 9)
    with pytest.raises(ValueError, match=r"w\.gguf does not make the WanTransformer3DModel of "):
        load_pipeline(tiny_wan, device="cpu", dtype="float32", quantize=str(file))


def write_gguf(tensors, path):
    """Weights in the model's own names, matrices as Q8_0."""
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(path, "wan")
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        if values.ndim == 2 and values.shape[-1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_files_make_nearly_the_same_video(tiny_wan, tmp_path):
    from safetensors.torch import load_file

    tensors = load_file(next((tiny_wan / "transformer").glob("*.safetensors")))
    file = tmp_path / "w.gguf"
    write_gguf(tensors, file)
    request = GenerationRequest(
        "red", height=32, width=32, frames=5, steps=2, sparse_algo="nabla-0.5"
    )
    videos = []
    for quantize in ("", str(file)):
        pipeline = load_pipeline(tiny_wan, device="cpu", dtype="float32", quantize=quantize)
        video, record = generate(pipeline, request)
        videos.append(video.astype(int))
    assert record.config["quantized"] == "GGUFQuantizer"
    assert 0 < np.abs(videos[1] - videos[0]).mean() < 0.5
    whole = file.read_bytes()
    file.write_bytes(whole[:-500])
    names = sorted(tensors)
    for change in (None, {names[3]: None}, {names[0]: torch.zeros(7)}):
        if change is not None:
            changed = tensors | change
            write_gguf({name: x for name, x in changed.items() if x is not None}, file)
        with pytest.raises(ValueError, match=r"w\.gguf does not make the Wan[^\n]*, or none\.$"):
            load_pipeline(tiny_wan, device="cpu", dtype="float32", quantize=str(file))


def test_torchao_makes_nearly_the_same_video(tiny_wan):
    pytest.importorskip("torchao")
    request = GenerationRequest("red", height=32, width=32, frames=5, steps=2)
    videos = []
    for quantize in ("", "torchao"):
        pipeline = load_pipeline(tiny_wan, device="cpu", dtype="float32", quantize=quantize)
        video, record = generate(pipeline, request)
        videos.append(video.astype(int))
    assert record.config["quantized"] == "TorchAoHfQuantizer"
    assert 0 < np.abs(videos[1] - videos[0]).mean() < 0.5


def test_dtypes_have_short_names():
    pairs = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    assert {name: resolve_dtype(name, CPU) for name in pairs} == pairs
    with pytest.raises(ValueError, match=r"unknown dtype 'int4'\. Known: auto, float32"):
        resolve_dtype("int4", CPU)


def test_the_vae_decodes_in_tiles(tiny_wan):
    request = GenerationRequest("red", height=32, width=32, frames=5, steps=1)
    saving = {"vae_tiling": True, "vae_slicing": True}
    pipeline = load_pipeline(tiny_wan, device="cpu", dtype="fp32", **saving)
    assert pipeline.vae.use_tiling and pipeline.vae.use_slicing
    _, record = generate(pipeline, request)
    assert record.config["vae_tiling"] == "on"
    assert "vae_tiling" not in model_identity(load_pipeline(tiny_wan, device="cpu", dtype="fp32"))


def test_a_model_by_its_id(tiny_wan, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "a" * 40
    folder = tmp_path / "models--someone--tiny-wan"
    shutil.copytree(tiny_wan, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    pipeline = load_pipeline("someone/tiny-wan", device="cpu", dtype="float32")
    assert type(pipeline).__name__ == "WanPipeline"
    with pytest.raises(ValueError, match="Download it once with: hf download someone/other"):
        load_pipeline("someone/other", device="cpu")
