"""Tiny checkpoints of every family load and run; mixed-up ones say what is wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_wan
from nabla_attn.models.applied import STATE_NAME
from nabla_attn.wan import WAN_FAMILIES, load_wan_pipeline, load_wan_transformer, read_layout
from nabla_attn.wan.parts import load_part

FP32 = torch.float32
STEM = "diffusion_pytorch_model"


def is_sparse(model):
    return STATE_NAME in model.__dict__


def algorithm_of(model):
    return str(model.__dict__[STATE_NAME].planner.settings.schedule.algorithm)


@pytest.mark.parametrize("family", WAN_FAMILIES)
def test_every_family_loads(tmp_path, family):
    folder = tiny_wan.write_checkpoint(tmp_path / "ckpt", family)
    assert read_layout(folder).family == family
    pipe = load_wan_pipeline(folder, WAN_FAMILIES[family].tasks[0], dtype=FP32, text_dtype=FP32)
    assert pipe.vae.dtype == FP32
    assert next(pipe.transformer.parameters()).device.type == "cpu"
    assert (pipe.transformer_2 is not None) == (family in ("t2v-2.2", "i2v-2.2", "vace-2.2"))
    assert not is_sparse(pipe.transformer)


@pytest.mark.parametrize("task", ["i2v-14B", "vace-1.3B", "ti2v-5B"])
def test_wrong_task_is_told_by_the_keys(tmp_path, task):
    folder = tiny_wan.write_checkpoint(tmp_path / "ckpt", "t2v")
    with pytest.raises(ValueError, match=r"checkpoint for t2v-1.3B or t2v-14B or t2i-14B"):
        load_wan_pipeline(folder, task)
    with pytest.raises(ValueError, match="unknown task 'video'"):
        load_wan_pipeline(folder, "video")


def test_algorithm_of_the_file_unless_one_is_given(tmp_path):
    tiny_wan.write_transformer(tmp_path, "t2v", sparse_algo="nabla-0.6_sta-11-3-3")
    model = load_wan_transformer(tmp_path)
    assert algorithm_of(model) == "nabla-0.6_sta-11-3-3"
    model = load_wan_transformer(tmp_path, "nabla-0.7")
    assert algorithm_of(model) == "nabla-0.7"
    assert not is_sparse(load_wan_transformer(tmp_path, "dense"))
    with pytest.raises(ValueError, match="nabla-2"):
        load_wan_transformer(tmp_path, "nabla-2")


def test_shards_and_single_file_give_the_same(tmp_path):
    torch.manual_seed(0)
    tiny_wan.write_transformer(tmp_path / "shards", "t2v", num_layers=2, num_shards=3)
    torch.manual_seed(0)
    state = tiny_wan.write_transformer(tmp_path / "one", "t2v", num_layers=2)
    prefixed = {f"model.diffusion_model.{name}": value for name, value in state.items()}
    save_file(prefixed, tmp_path / "one" / "export.safetensors")
    reference = load_wan_transformer(tmp_path / "shards").state_dict()
    for path in (tmp_path / "one" / f"{STEM}.safetensors", tmp_path / "one" / "export.safetensors"):
        for name, value in load_wan_transformer(path).state_dict().items():
            assert torch.equal(value, reference[name]), name


def test_types(tmp_path):
    tiny_wan.write_transformer(tmp_path, "t2v")
    model = load_wan_transformer(tmp_path, dtype=torch.bfloat16)
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert model.scale_shift_table.dtype == FP32
    assert load_wan_transformer(tmp_path).proj_out.weight.dtype == FP32


def break_truncated(folder):
    path = folder / f"{STEM}-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return path.name


def break_missing(folder):
    (folder / f"{STEM}-00003-of-00003.safetensors").unlink()
    return f"lacks {STEM}-00003-of-00003"


def break_extra(folder):
    save_file({"x": torch.zeros(1)}, folder / f"{STEM}-00004-of-00004.safetensors")
    return f"extra weight files.*{STEM}-00004-of-00004"


def break_index_path(folder):
    index = folder / f"{STEM}.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["head.head.bias"] = "../../etc/secret.safetensors"
    index.write_text(json.dumps(data))
    return "may only name .safetensors files beside it"


def break_twice(folder):
    first = load_file(folder / f"{STEM}-00001-of-00003.safetensors")
    second = load_file(folder / f"{STEM}-00002-of-00003.safetensors")
    name = next(iter(first))
    save_file(second | {name: first[name]}, folder / f"{STEM}-00002-of-00003.safetensors")
    return f"{name} is in both"


def break_tensor(folder, change):
    for path in sorted(folder.glob("*.safetensors")):
        state = load_file(path)
        if "blocks.0.ffn.2.bias" in state:
            state["blocks.0.ffn.2.bias"] = change(state["blocks.0.ffn.2.bias"])
            save_file(state, path)


def break_shape(folder):
    break_tensor(folder, lambda t: torch.zeros(t.numel() + 1))
    return r"blocks.0.ffn.2.bias has shape \(25,\), its model needs \(24,\)"


def break_dtype(folder):
    break_tensor(folder, lambda t: t.to(torch.int8))
    return "only float weights"


def break_lost_tensor(folder):
    path = folder / f"{STEM}-00001-of-00003.safetensors"
    state = load_file(path)
    del state["blocks.1.ffn.0.bias" if "blocks.1.ffn.0.bias" in state else sorted(state)[0]]
    save_file(state, path)
    return "lacks|without"


BREAKS = [
    break_truncated,
    break_missing,
    break_extra,
    break_index_path,
    break_twice,
    break_shape,
    break_dtype,
    break_lost_tensor,
]


@pytest.mark.parametrize("damage", BREAKS)
def test_damaged_transformer_is_named(tmp_path, damage):
    tiny_wan.write_transformer(tmp_path, "t2v", num_layers=2, num_shards=3)
    message = damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_wan_transformer(tmp_path)


def test_swapped_files_are_named(tmp_path):
    folder = tiny_wan.write_checkpoint(tmp_path / "ckpt", "i2v")
    vae, t5 = folder / "Wan2.1_VAE.pth", folder / "models_t5_umt5-xxl-enc-bf16.pth"
    kept = vae.read_bytes()
    vae.write_bytes(t5.read_bytes())
    with pytest.raises(ValueError, match=r"Wan2.1_VAE.pth: expected the VAE, found the text enc"):
        load_wan_pipeline(folder, "i2v-14B")
    vae.write_bytes(kept[:-1000])
    with pytest.raises(ValueError, match=r"Wan2.1_VAE.pth"):
        load_wan_pipeline(folder, "i2v-14B")
    vae.unlink()
    with pytest.raises(ValueError, match=r"lacks Wan2.1_VAE.pth"):
        load_wan_pipeline(folder, "i2v-14B")


class Runs:
    """Unpickling it would run code."""

    def __reduce__(self):
        return (print, ("code ran",))


def test_pickles_with_code_are_refused(tmp_path, capsys):
    path = tmp_path / "Wan2.1_VAE.pth"
    torch.save({"conv1.weight": Runs()}, path)
    with pytest.raises(ValueError, match="files that need code to be read are refused"):
        load_part("VAE", path)
    assert "code ran" not in capsys.readouterr().out
    torch.save({"epoch": 3}, path)
    with pytest.raises(ValueError, match="entry 'epoch' is int, not a tensor"):
        load_part("VAE", path)


def test_compressed_archives_are_refused(tmp_path):
    import zipfile

    plain, packed = tmp_path / "plain.pth", tmp_path / "Wan2.1_VAE.pth"
    torch.save({"conv1.weight": torch.zeros(100_000)}, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry.filename))
    with pytest.raises(ValueError, match="stored, not compressed"):
        load_part("VAE", packed)


def test_unknown_places(tmp_path):
    with pytest.raises(ValueError, match="no such checkpoint"):
        load_wan_transformer(tmp_path / "nothing")
    (tmp_path / "model-Q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"model-Q4.gguf is quantised"):
        load_wan_transformer(tmp_path)
    with pytest.raises(ValueError, match=r"format \.gguf is not known"):
        load_wan_transformer(tmp_path / "model-Q4.gguf")


def test_heads_that_the_weights_do_not_tell(tmp_path):
    tiny_wan.write_transformer(tmp_path, "t2v", num_heads=5)
    with pytest.raises(ValueError, match="24 channels do not split into 5 heads"):
        load_wan_transformer(tmp_path)


def test_wan_2_2_vae_runs(tmp_path):
    torch.manual_seed(0)
    torch.save(tiny_wan.vae_2_2_state(), tmp_path / "Wan2.2_VAE.pth")
    vae = load_part("Wan 2.2 VAE", tmp_path / "Wan2.2_VAE.pth")
    with torch.no_grad():
        latent = vae.encode(torch.randn(1, 3, 5, 64, 32)).latent_dist.mode()
        video = vae.decode(latent)[0]
    assert latent.shape == (1, 48, 2, 4, 2)
    assert video.shape == (1, 3, 5, 64, 32)


def test_progress_is_told(tmp_path):
    tiny_wan.write_transformer(tmp_path, "t2v")
    seen = []
    load_wan_transformer(tmp_path, on_progress=lambda *step: seen.append(step))
    assert seen[-1][1] == seen[-1][2] == len(seen)


def test_every_public_name_of_the_package_is_there():
    import nabla_attn as na

    assert na.load_wan_transformer is load_wan_transformer
    assert all(getattr(na, name) is not None for name in na.__all__)
