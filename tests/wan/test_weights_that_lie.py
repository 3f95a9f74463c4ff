"""Files whose names, shapes, sizes or configs lie are refused in one line, before any building."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_wan
from nabla_attn.wan import load_wan_pipeline, load_wan_transformer, read_layout
from nabla_attn.wan.parts import load_part, plan_part
from nabla_attn.wan.shapes import WanConfig
from nabla_attn.wan.tensor_files import TensorFile, TensorInfo, open_tensor_file

STEM = "diffusion_pytorch_model"
T5 = load_file(tiny_wan.GOLDEN / "t5_a_weights_bf16.safetensors")
torch.manual_seed(0)
HEADS = WanConfig(num_heads=1)
PARTS = {
    "t2v": ("transformer", tiny_wan.transformer_state("t2v", 2), HEADS),
    "flf2v": ("transformer", tiny_wan.transformer_state("flf2v"), HEADS),
    "vace": ("transformer", tiny_wan.transformer_state("vace"), HEADS),
    "text encoder": ("text encoder", T5),
    "VAE": ("VAE", tiny_wan.vae_state()),
    "Wan 2.2 VAE": ("Wan 2.2 VAE", tiny_wan.vae_2_2_state()),
    "image encoder": ("image encoder", tiny_wan.clip_state()),
}


def plan(kind, infos, *config):
    """Check a file that has nothing but its header."""
    return plan_part(kind, [TensorFile(Path("weights.pth"), infos, lambda name: None)], *config)


def refuse(infos, kind, *config):
    """One line that names the file; a traceback of any other kind fails the test."""
    with pytest.raises(ValueError, match=r"^[^\n]*weights\.pth[^\n]*$") as caught:
        plan(kind, infos, *config)
    assert len(str(caught.value)) < 1000
    return str(caught.value)


def header(state):
    return {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in state.items()}


def one_of_each_kind(infos):
    """Names that differ in more than numbers, without those that no model uses."""
    kinds = {}
    for name in infos:
        if not re.match(r"visual\.head|textual|log_scale", name):
            kinds.setdefault(re.sub(r"[0-9]+", "0", name), name)
    # The parts have their config read off the first names; of many further ones, some do.
    found = list(kinds.values())
    return found[:12] + found[12::4]


# Their last axis may have any length.
FREE = ("text_embedding.0.weight", "time_embedding.0.weight")


def without_axes(shape):
    return ()


def with_one_more(shape):
    return (*shape, 3)


def with_none(shape):
    return (0, *shape[1:])


def twice_as_wide(shape):
    return (*shape[:-1], 2 * shape[-1] + 1)


def huge(shape):
    return tuple(10**6 for _ in shape)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("change", [without_axes, with_one_more, with_none, twice_as_wide, huge])
def test_every_tensor_of_another_shape(part, change):
    kind, state, *config = PARTS[part]
    infos = header(state)
    plan(kind, infos, *config)
    for name in one_of_each_kind(infos):
        if change is not twice_as_wide or name not in FREE:
            changed = TensorInfo(change(infos[name].shape), infos[name].dtype)
            refuse(infos | {name: changed}, kind, *config)


@pytest.mark.parametrize("part", PARTS)
def test_every_tensor_missing(part):
    kind, state, *config = PARTS[part]
    infos = header(state)
    for name in one_of_each_kind(infos):
        if name != "img_emb.emb_pos":  # without it, it is another model
            refuse({other: info for other, info in infos.items() if other != name}, kind, *config)


NUMBERS = ["999999999", "7", "9" * 5000, "-1", "٣", "1.5", "", "0x1", "00"]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number[:9])
@pytest.mark.parametrize("part", PARTS)
def test_numbers_of_blocks_that_are_not_there(part, number):
    kind, state, *config = PARTS[part]
    infos = header(state)
    block = next(name for name in infos if re.search(r"\.0\.", name))
    stranger = block.replace(".0.", f".{number}.", 1)
    refuse(infos | {stranger: infos[block]}, kind, *config)


def test_more_blocks_than_any_model_has():
    infos = header(PARTS["t2v"][1])
    many = {f"blocks.{i}.norm3.bias": infos["blocks.0.norm3.bias"] for i in range(100_000)}
    assert "at most" in refuse(infos | many, "transformer", HEADS)


@pytest.mark.parametrize(
    "name", ["a\nb", "\x1b[31mred", "x" * 10_000, "", "blocks", "blocks..", "."]
)
def test_strange_names_are_shown_in_one_line(name):
    infos = header(PARTS["t2v"][1])
    refuse(infos | {name: TensorInfo((3,), torch.float32)}, "transformer", HEADS)


def test_a_tensor_with_and_without_prefix():
    infos = header(PARTS["t2v"][1])
    doubled = {"model.diffusion_model.patch_embedding.bias": infos["patch_embedding.bias"]}
    assert "is in both" in refuse(infos | doubled, "transformer", HEADS)


BAD_CONFIGS = [
    {"num_heads": value} for value in (0, -1, 1.5, "1", True, [1], 10**30, float("nan"), {"a": 1})
]
BAD_CONFIGS += [{"eps": value} for value in (float("nan"), float("inf"), 0, -1e-6, "1e-6", [])]
BAD_CONFIGS += [{"text_len": value} for value in (0, 10**9, 512.5, "512", float("nan"))]
BAD_CONFIGS += [{"vace_layers": value} for value in ("0", 0, [0.5], [True, "a"], {"0": 1})]
BAD_CONFIGS += [{"sparse_algo": value} for value in (7, ["nabla-0.7"], float("nan"))]


@pytest.mark.parametrize("config", BAD_CONFIGS, ids=str)
def test_impossible_values_in_config_json(tmp_path, config):
    tiny_wan.write_transformer(tmp_path, "vace", **config)
    name = next(iter(config))
    with pytest.raises(ValueError, match=rf"config\.json: (not valid JSON \()?{name}[^\n]*$"):
        load_wan_transformer(tmp_path)


@pytest.mark.parametrize("text", ["[]", "7", "{", "", '{"eps": 1e999}', "\xff", "[" * 100_000])
def test_a_config_that_is_no_object(tmp_path, text):
    tiny_wan.write_transformer(tmp_path, "t2v")
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"config\.json[^\n]*$"):
        load_wan_transformer(tmp_path)


@pytest.mark.parametrize("layers", [[1], [0, 0], [5], [-1], [0, 1, 2]])
def test_vace_layers_that_no_model_has(tmp_path, layers):
    tiny_wan.write_transformer(tmp_path, "vace", vace_layers=layers)
    with pytest.raises(ValueError, match=r"vace_layers[^\n]*$"):
        load_wan_transformer(tmp_path)


def lying_tensors():
    return {
        "stride 0": torch.zeros(1).expand(4096, 4096),
        "stride 0 in part": torch.zeros(4096, 1).expand(4096, 4096),
        "sparse": torch.eye(8).to_sparse(),
        "nested": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        "meta": torch.zeros(4096, 4096, device="meta"),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("lie", lying_tensors())
def test_tensors_that_claim_more_than_is_stored(tmp_path, lie, is_zip):
    path = tmp_path / "Wan2.1_VAE.pth"
    state = tiny_wan.vae_state() | {"conv1.weight": lying_tensors()[lie]}
    torch.save(state, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ValueError, match=r"Wan2\.1_VAE\.pth[^\n]*$"):
        load_part("VAE", path)


def test_tensors_that_share_their_memory(tmp_path):
    block = torch.zeros(1000)
    torch.save({f"blocks.{i}.a": block for i in range(100)}, tmp_path / "a.pth")
    with (
        pytest.raises(ValueError, match="its tensors claim 400000 bytes"),
        open_tensor_file(tmp_path / "a.pth"),
    ):
        pass


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 100, b"\xff" * 8 + b"{}", b"PK\x03\x04", b"\x80\x02."]
)
@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_files_of_rubbish(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}[^\n]*$"), open_tensor_file(tmp_path / name):
        pass


def test_a_header_with_shapes_of_nothing(tmp_path):
    """Shapes with an axis of 0 take no bytes, so that the other axes may claim anything."""
    state = PARTS["image encoder"][1] | {"visual.pos_embedding": torch.zeros(0, 10**12, 80)}
    save_file({name: t.contiguous() for name, t in state.items()}, tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError, match=r"visual\.pos_embedding has shape \[0, 1000000000000, 80\]"
    ):
        load_part("image encoder", tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "weight_map", [{}, [], {"a": 1}, {"a": "/etc/passwd"}, {"a": "b\n.safetensors"}]
)
def test_indices_that_name_anything(tmp_path, weight_map):
    tiny_wan.write_transformer(tmp_path, "t2v", num_shards=2)
    index = tmp_path / f"{STEM}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"index\.json[^\n]*$"):
        load_wan_transformer(tmp_path)


def test_both_experts_are_used_or_the_checkpoint_is_refused(tmp_path):
    folder = tiny_wan.write_checkpoint(tmp_path / "vace", "vace-2.2")
    pipe = load_wan_pipeline(folder, dtype=torch.float32, text_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    calls = dict.fromkeys(("transformer", "transformer_2"), 0)
    for name in calls:
        getattr(pipe, name).register_forward_pre_hook(
            lambda *_, name=name: calls.__setitem__(name, calls[name] + 1)
        )
    options = {"height": 32, "width": 32, "num_frames": 5, "output_type": "latent"}
    pipe(prompt="a", num_inference_steps=6, guidance_scale=1.0, **options)
    assert min(calls.values()) > 0 and sum(calls.values()) == 6
    with pytest.raises(ValueError, match="is a checkpoint for vace-A14B"):
        load_wan_pipeline(folder, "vace-14B")


@pytest.mark.parametrize("families", [("t2v", "vace"), ("t2v", "i2v"), ("ti2v-2.2", "ti2v-2.2")])
def test_experts_that_no_pipeline_uses_together(tmp_path, families):
    folder = tiny_wan.write_checkpoint(tmp_path / "ckpt", "t2v-2.2")
    for name, family in zip(("high_noise_model", "low_noise_model"), families, strict=True):
        tiny_wan.write_transformer(folder / name, family)
    with pytest.raises(ValueError, match=r"of different kinds|no task is known for 2 transformer"):
        load_wan_pipeline(folder)
    assert load_wan_transformer(folder / "low_noise_model") is not None


def test_one_expert_alone_is_no_pipeline(tmp_path):
    tiny_wan.write_transformer(tmp_path, "i2v-2.2")
    with pytest.raises(ValueError, match="no task is known for 1 transformer"):
        read_layout(tmp_path).check_complete()


@pytest.mark.parametrize(
    "content", ['{"auto_map": {"AutoTokenizer": ["evil.Tokenizer", null]}}', "{", "[]", ""]
)
def test_tokenizers_run_no_code_and_ask_nothing(tmp_path, monkeypatch, capsys, content):
    folder = tiny_wan.write_checkpoint(tmp_path / "ckpt", "t2v")
    tokenizer = folder / "google" / "umt5-xxl"
    for path in tokenizer.iterdir():
        path.unlink()
    (tokenizer / "tokenizer_config.json").write_text(content)
    (tokenizer / "evil.py").write_text("print('code ran')\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    with pytest.raises(ValueError, match=r"cannot read the tokenizer in [^\n]*$"):
        load_wan_pipeline(folder)
    assert "code ran" not in capsys.readouterr().out


def test_instruct_models_run_no_code_and_ask_nothing(tmp_path, monkeypatch, capsys):
    from nabla_attn.wan.prompt_extension import PromptExtension

    config = {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["evil.T", null]}}'
    )
    (tmp_path / "evil.py").write_text("print('code ran')\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    with pytest.raises(ValueError, match=r"is no instruct model [^\n]*$"):
        PromptExtension(model=str(tmp_path)).extend("a", 0, "cpu")
    assert "code ran" not in capsys.readouterr().out
