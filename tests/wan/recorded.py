"""Recorded runs of the reference, and its tiny weights laid out as original checkpoints."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).parents[1] / "golden"


def read_golden(name):
    """A recorded file as float32 tensors; integers stay."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    return {key: t.float() if t.is_floating_point() else t for key, t in tensors.items()}


def read_notes(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def make_transformer_dir(folder, name, weights, **config):
    folder.mkdir()
    shutil.copy(GOLDEN / f"{weights}.safetensors", folder / "diffusion_pytorch_model.safetensors")
    config = read_notes(name)["config"] | {"_class_name": "WanModel"} | config
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_pickle(folder, weights):
    path = folder / f"{weights}.pth"
    torch.save(load_file(GOLDEN / f"{weights}.safetensors"), path)
    return path


@pytest.fixture(scope="session")
def t2v_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity") / "t2v"
    return make_transformer_dir(folder, "model_a", "model_a_weights_bf16")


@pytest.fixture(scope="session")
def i2v_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity") / "i2v"
    return make_transformer_dir(folder, "i2v_a", "i2v_a_weights")


def pad_text(context, length):
    """[1, length, dim]: the reference fills up with zeros before the text embedding."""
    padded = torch.zeros(1, length, context.shape[1])
    padded[0, : context.shape[0]] = context
    return padded


def assert_close(got, expected, atol):
    torch.testing.assert_close(got, expected, atol=atol, rtol=0)
