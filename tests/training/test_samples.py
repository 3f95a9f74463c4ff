from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nabla_attn.generation.request import GenerationRequest
from nabla_attn.moving_shapes.judge import MovingShapesScorer
from nabla_attn.training import samples
from nabla_attn.training.samples import SampleMaker


def device_of(module):
    return next(module.parameters()).device.type


class Pipeline(SimpleNamespace):
    """Has a place, as pipelines do; a transformer on "meta" stands for one on a GPU."""

    device = torch.device("cpu")

    def to(self, device):
        self.device = torch.device(device)
        return self


@pytest.fixture
def pipeline():
    return Pipeline(transformer=torch.nn.Linear(1, 1))


def sample(pipeline, transformer, folder):
    request = GenerationRequest("", frames=5, height=16, width=16, steps=1, guidance=1.0)
    return SampleMaker(pipeline, request, MovingShapesScorer(), 1, folder)(3, transformer)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_samples_are_made_where_the_trained_transformer_is(pipeline, tmp_path, monkeypatch, device):
    seen = []

    def generate(made_by, request):
        seen.append((made_by.device.type, device_of(made_by.transformer)))
        return np.zeros((5, 16, 16, 3), np.uint8), None

    monkeypatch.setattr(samples, "generate", generate)
    trained = torch.nn.Linear(1, 1, device=device)
    numbers = sample(pipeline, trained, tmp_path)
    assert seen == [(device, device)]
    # The same pipeline encodes the clips: it has to be back where it was.
    assert pipeline.device.type == "cpu" and device_of(trained) == device
    assert numbers.keys() >= {"right_colour"} and (tmp_path / "step-00000003.png").is_file()


def test_the_pipeline_goes_back_when_a_sample_fails(pipeline, tmp_path, monkeypatch):
    def generate(made_by, request):
        raise ValueError("no sample")

    monkeypatch.setattr(samples, "generate", generate)
    with pytest.raises(ValueError, match="no sample"):
        sample(pipeline, torch.nn.Linear(1, 1, device="meta"), tmp_path)
    assert pipeline.device.type == "cpu"
