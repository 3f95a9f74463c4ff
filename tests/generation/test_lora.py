import json
import shutil

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import save_file
from typer.testing import CliRunner

import nabla_attn as na
from nabla_attn.cli import app
from nabla_attn.generation.lora import BUILTIN_LORA, LORA_WEIGHTS, load_lora, lora_fingerprint
from nabla_attn.generation.pipeline import BUILTIN_DIRECTORY, load_pipeline, model_identity
from nabla_attn.generation.request import ModelDefaults
from nabla_attn.moving_shapes.dataset import WorldSet
from nabla_attn.record import RunRecord

SIZE = ["--height=32", "--width=32", "--frames=5", "--steps=1", "--device=cpu", "--dtype=float32"]
NAMES = ("to_q", "to_k", "to_v", "to_out.0")


def write_lora(folder, seed=0, alpha=4, **defaults):
    """Adapters of rank 2 for the projections of `tiny_wan`, and what generation shall do."""
    random = torch.Generator().manual_seed(seed)
    layers = {}
    for block in range(2):
        for name in NAMES:
            key = f"blocks.{block}.attn1.{name}"
            layers[f"{key}.lora_A.weight"] = torch.randn(2, 32, generator=random)
            layers[f"{key}.lora_B.weight"] = torch.randn(32, 2, generator=random)
    settings = {"r": 2, "lora_alpha": alpha, "target_modules": [f"attn1.{n}" for n in NAMES]}
    WanPipeline.save_lora_weights(
        folder, layers, transformer_lora_adapter_metadata=settings, weight_name=LORA_WEIGHTS
    )
    if defaults:
        (folder / "defaults.json").write_text(json.dumps(defaults))
    return str(folder)


def predict(pipeline):
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return pipeline.transformer(
            hidden_states=torch.randn(1, 4, 2, 4, 4, generator=random),
            timestep=torch.tensor([500.0]),
            encoder_hidden_states=torch.randn(1, 5, 16, generator=random),
            return_dict=False,
        )[0]


def test_adapters_act_as_diffusers_own_loading_does(tiny_wan, tmp_path):
    source = write_lora(tmp_path)
    theirs = WanPipeline.from_pretrained(tiny_wan)
    plain = predict(theirs)
    theirs.load_lora_weights(source)
    ours = load_pipeline(tiny_wan, device="cpu", dtype="float32", lora=[source])
    assert torch.equal(predict(ours), predict(theirs))
    assert not torch.allclose(predict(ours), plain, atol=1e-3)
    as_file = load_pipeline(
        tiny_wan, device="cpu", dtype="float32", lora=[f"{source}/{LORA_WEIGHTS}"]
    )
    assert torch.equal(predict(as_file), predict(theirs))


def test_several_adapters_act_together_and_records_tell_them_apart(tiny_wan, tmp_path):
    first, second = (write_lora(tmp_path / name, seed=seed) for seed, name in enumerate("ab"))
    found = {}
    for name, lora in {"none": [], "a": [first], "b": [second], "ab": [first, second]}.items():
        pipeline = load_pipeline(tiny_wan, device="cpu", dtype="float32", lora=lora)
        found[name] = predict(pipeline), model_identity(pipeline).get("lora")
    outputs = [output for output, _ in found.values()]
    assert all(not torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])
    assert found["none"][1] is None and len({name for _, name in found.values()}) == 4


def test_the_fingerprint_follows_weights_scale_and_use(tiny_wan, tmp_path):
    pipeline = WanPipeline.from_pretrained(tiny_wan)
    assert lora_fingerprint(pipeline) is None
    load_lora(pipeline, write_lora(tmp_path / "a"))
    again = WanPipeline.from_pretrained(tiny_wan)
    load_lora(again, write_lora(tmp_path / "a again"))
    assert lora_fingerprint(pipeline) == lora_fingerprint(again)
    before = lora_fingerprint(pipeline)
    pipeline.transformer.set_adapters(["default_0"], weights=[0.5])
    assert lora_fingerprint(pipeline) not in (before, None)
    pipeline.disable_lora()
    assert lora_fingerprint(pipeline) is None


def test_the_second_transformer_is_named(tiny_wan, tmp_path):
    pipeline = WanPipeline.from_pretrained(tiny_wan)
    source = write_lora(tmp_path)
    with pytest.raises(ValueError, match="WanPipeline has no transformer_2"):
        load_lora(pipeline, f"transformer_2={source}")
    pipeline.register_modules(transformer_2=type(pipeline.transformer).from_config(
        pipeline.transformer.config
    ))  # fmt: skip
    load_lora(pipeline, source)
    first = lora_fingerprint(pipeline)
    pipeline.unload_lora_weights()
    load_lora(pipeline, f"transformer_2={source}")
    assert lora_fingerprint(pipeline) not in (first, None)
    assert not hasattr(pipeline.transformer, "peft_config")
    assert pipeline.transformer_2.peft_config


def test_what_does_not_fit_is_named(tiny_wan, tmp_path):
    pipeline = WanPipeline.from_pretrained(tiny_wan)
    with pytest.raises(ValueError, match="no LoRA weights at 'nowhere'"):
        load_lora(pipeline, "nowhere")
    (tmp_path / "x.bin").write_bytes(b"1")
    with pytest.raises(ValueError, match=r"Pass a folder with .*, or a .safetensors file"):
        load_lora(pipeline, str(tmp_path / "x.bin"))
    for name, tensors in {
        "other names": {"transformer.nothing.lora_A.weight": torch.zeros(2, 32)},
        "no adapters": {"transformer.blocks.0.attn1.to_q.weight": torch.zeros(32, 32)},
        "other sizes": {
            f"transformer.blocks.0.attn1.to_q.lora_{side}.weight": torch.zeros(shape)
            for side, shape in {"A": (2, 48), "B": (48, 2)}.items()
        },
        "other part": {"text_encoder.a.lora_A.weight": torch.zeros(2, 32)},
    }.items():
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path)
        with pytest.raises(ValueError, match=name) as error:
            load_lora(WanPipeline.from_pretrained(tiny_wan), str(path))
        assert "\n" not in str(error.value)
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="damaged"):
        load_lora(pipeline, str(path))


def test_adapters_bring_their_algorithm_and_the_record_names_them(tiny_wan, tmp_path):
    model = shutil.copytree(tiny_wan, tmp_path / "model")
    (model / "defaults.json").write_text(
        json.dumps(
            {
                "fps": 9,
                "sparse_algo": "nabla-0.9",
                "schedule": {"algorithm": "nabla-0.9", "dense_first_steps": 1},
            }
        )
    )
    source = write_lora(tmp_path / "lora", sparse_algo="nabla-0.4")
    defaults = ModelDefaults.load(model, [source])
    assert (defaults.fps, defaults.sparse_algo, defaults.schedule) == (9, "nabla-0.4", None)
    for name, extra in {"with": ["--lora", source], "without": []}.items():
        output = tmp_path / f"{name}.mp4"
        command = ["generate", "--prompt", "a", "--model", str(model), *SIZE, *extra]
        result = CliRunner().invoke(app, [*command, "--output", str(output)])
        assert result.exit_code == 0, result.output
    with_lora, without = (RunRecord.load(tmp_path / f"{name}.json") for name in ("with", "without"))
    assert with_lora.config["sparse_algo"] == "nabla-0.4" and with_lora.config["lora"]
    assert without.config["sparse_algo"] == "nabla-0.9" and "lora" not in without.config
    assert with_lora.numbers["frames_sha256"] != without.numbers["frames_sha256"]
    result = CliRunner().invoke(app, [*command, "--lora", "nowhere", "--output", str(output)])
    assert result.exit_code != 0 and "no LoRA weights at 'nowhere'" in result.output


def test_the_built_in_adapters_bring_sparse_attention_closer_to_dense():
    plain, adapted = (
        load_pipeline("builtin", device="cpu", dtype="float32", lora=lora)
        for lora in ((), ("builtin",))
    )
    defaults = ModelDefaults.load(BUILTIN_DIRECTORY, ["builtin"])
    assert defaults.sparse_algo == "topk-0.05_tail-first"
    size = {name: getattr(defaults, name) for name in ("frames", "height", "width")}
    clip = WorldSet(plain, clips=1, seed=99, **size)[0]
    noise = torch.randn(clip["latents"].shape)
    arguments = {
        "hidden_states": (0.1 * clip["latents"] + 0.9 * noise)[None],
        "timestep": torch.tensor([900.0]),
        "encoder_hidden_states": clip["conditions"]["encoder_hidden_states"][None].float(),
        "return_dict": False,
    }
    with torch.no_grad():
        dense = plain.transformer(**arguments)[0]
        errors = []
        for pipeline in (plain, adapted):
            with na.apply(pipeline.transformer, defaults.sparse_algo):
                sparse = pipeline.transformer(**arguments)[0]
            errors.append(((sparse - dense).norm() / dense.norm()).item())
    assert errors[1] < errors[0]


def test_the_built_in_model_and_its_adapters_stay_small():
    folders = (BUILTIN_DIRECTORY, BUILTIN_LORA)
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25e6


@pytest.mark.parametrize(
    ("extra", "first"),
    [
        ("transformer.blocks.3.attn1.to_q", "transformer.blocks.3.attn1.to_q"),
        ("transformer.blocks.0.attn2.add_k_proj", "transformer.blocks.0.attn2.add_k_proj"),
        ("text_encoder.encoder.block.0.layer.0.SelfAttention.q", "text_encoder.encoder.block.0"),
        ("", ""),
    ],
)
def test_layers_without_a_place_are_counted(tiny_wan, tmp_path, recwarn, extra, first):
    layers = [f"transformer.blocks.{b}.attn1.{p}" for b in (0, 1) for p in ("to_q", "to_k")]
    layers += [extra] if extra else []
    tensors = {}
    for layer in layers:
        tensors[f"{layer}.lora_A.weight"] = torch.randn(2, 32)
        tensors[f"{layer}.lora_B.weight"] = torch.randn(32, 2)
    save_file(tensors, tmp_path / "half.safetensors")
    load_pipeline(
        tiny_wan, device="cpu", dtype="float32", lora=[str(tmp_path / "half.safetensors")]
    )
    said = [str(each.message) for each in recwarn.list if "left out" in str(each.message)]
    assert bool(said) == bool(extra)
    if extra:
        assert "1 of its 5 layers have no place in WanTransformer3DModel" in said[0]
        assert f"are left out, first {first}" in said[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"0.attn1.to_q.lora_B.weight": None},
            "1 of its 8 tensors are missing, .*to_q.lora_B",
        ),
        (
            {"1.attn1.to_k.lora_A.weight": None},
            "1 of its 8 tensors are missing, .*to_k.lora_A",
        ),
        (
            {"0.attn1.to_q.lora_B.bias": torch.ones(32)},
            "3 of its 12 tensors are missing",
        ),
        ({"0.attn1.to_q.lora_A.weight": torch.full((2, 32), torch.nan)}, "no finite numbers"),
    ],
)
def test_adapters_without_all_of_their_numbers_are_refused(tiny_wan, tmp_path, change, words):
    tensors = {
        f"transformer.blocks.{block}.attn1.{name}.lora_{side}.weight": torch.ones(shape)
        for block in (0, 1)
        for name in ("to_q", "to_k")
        for side, shape in {"A": (2, 32), "B": (32, 2)}.items()
    }
    tensors |= {f"transformer.blocks.{key}": value for key, value in change.items()}
    tensors = {key: value for key, value in tensors.items() if value is not None}
    save_file(tensors, tmp_path / "a.safetensors")
    pipeline = WanPipeline.from_pretrained(tiny_wan)
    plain = predict(pipeline)
    with pytest.raises(ValueError, match=rf"a\.safetensors cannot be used: .*{words}"):
        load_lora(pipeline, str(tmp_path / "a.safetensors"))
    assert torch.equal(predict(pipeline), plain)


def test_changes_of_whole_weights_are_told_of(tiny_wan, tmp_path):
    tensors = {"diffusion_model.blocks.0.norm3.diff": torch.ones(32)}
    for name in "qkvo":
        tensors[f"diffusion_model.blocks.0.self_attn.{name}.lora_A.weight"] = torch.ones(2, 32)
        tensors[f"diffusion_model.blocks.0.self_attn.{name}.lora_B.weight"] = torch.ones(32, 2)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match=r"1 of its 8 tensors change whole .*norm3\.diff"):
        load_lora(WanPipeline.from_pretrained(tiny_wan), str(tmp_path / "a.safetensors"))
