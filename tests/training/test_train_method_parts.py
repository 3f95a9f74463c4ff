"""Trained parts of methods in `nabla train`: learnt, resumed, saved with the result, used by it."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tests.training.clips import Stopped, equal, make_clips, small_config, stop_after

import nabla_attn as na
from nabla_attn.generation.pipeline import load_pipeline, model_identity
from nabla_attn.models import METHOD_PARTS
from nabla_attn.training.model import load_parts
from nabla_attn.training.setup import prepare
from nabla_attn.training.train import train

VSA = {"sparsity__algorithm": "vsa-0.3_block-1-4-4", "steps": 2}


def run(model, folder, *, recipe="finetune", **values):
    options = {name: values.pop(name) for name in ("resume", "on_log") if name in values}
    config = small_config(recipe, **VSA | values)
    return train(config, model, folder, dataset=make_clips(6, odd=True), **options)


def same(first, second):
    return equal(load_file(first), load_file(second))


def test_parts_learn_beside_all_weights_and_resume_bit_for_bit(tiny_wan, tmp_path):
    # Every second step is dense, in which parts have no gradient; the first is.
    values = {"sparsity__dense_share": 0.5, "ema": 0.9, "steps": 4}
    whole = run(tiny_wan, tmp_path / "whole", **values)
    with pytest.raises(Stopped):
        run(tiny_wan, tmp_path / "cut", on_log=stop_after(3), **values)
    cut = run(tiny_wan, tmp_path / "cut", resume=True, **values)
    file = f"transformer/{METHOD_PARTS}"
    assert same(whole / file, cut / file)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert same(whole / weights, cut / weights) and not same(whole / weights, tiny_wan / weights)
    assert all(value.any() for value in load_file(whole / file).values())
    with safe_open(whole / file, framework="pt") as tensors:
        assert tensors.metadata()["algorithm"] == VSA["sparsity__algorithm"]
    pipeline = load_pipeline(whole, device="cpu", dtype="float32")
    gate = pipeline.transformer.blocks[0].attn1.nabla_parts["vsa"].weight
    name = "transformer.blocks.0.attn1.nabla_parts.vsa.weight"
    assert torch.equal(gate, load_file(whole / file)[name])
    assert len(model_identity(pipeline)["method_parts"]) == 16
    # Another stage goes on from them.
    parts = load_parts(whole)
    prepare(small_config(**VSA), parts, make_clips())
    assert torch.equal(parts.transformer.blocks[0].attn1.nabla_parts["vsa"].weight, gate)


@pytest.mark.parametrize("algorithm", ["vsa-0.3_block-1-4-4", "sla-0.3_block-1-4-4"])
def test_parts_alone_distil_and_leave_the_weights(tiny_wan, tmp_path, algorithm):
    values = {"sparsity__algorithm": algorithm, "sparsity__parts_only": True}
    result = run(tiny_wan, tmp_path, recipe="distill", **values)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (result / weights).read_bytes() == (tiny_wan / weights).read_bytes()
    assert all(value.any() for value in load_file(result / f"transformer/{METHOD_PARTS}").values())
    assert json.loads((result / "defaults.json").read_text())["sparse_algo"] == algorithm
    assert not (tiny_wan / "transformer" / METHOD_PARTS).exists()


def test_parts_go_beside_adapters(tiny_wan, tmp_path):
    result = run(tiny_wan, tmp_path, recipe="distill", lora__rank=2)
    adapted = load_pipeline(tiny_wan, device="cpu", dtype="float32", lora=[str(result)])
    assert adapted.transformer.blocks[0].attn1.nabla_parts["vsa"].weight.any()
    own = tmp_path / "own"
    own.mkdir()
    shutil.copy(result / METHOD_PARTS, own / "gates.safetensors")
    given = load_pipeline(tiny_wan, device="cpu", dtype="float32", parts=own / "gates.safetensors")
    assert not getattr(given.transformer, "peft_config", None)
    with na.apply(given, "vsa-0.3_block-1-4-4") as handle:
        assert all(parameter.any() for parameter in handle.method_parameters())


def test_nothing_to_train_is_said(tiny_wan):
    values = {"sparsity__algorithm": "nabla-0.7", "sparsity__parts_only": True}
    with pytest.raises(ValueError, match=r"nabla-0\.7 has none"):
        prepare(small_config(**values), load_parts(tiny_wan), make_clips())
    with pytest.raises(ValueError, match=r"adapters without gradients"):
        small_config(**values, lora__rank=2)
