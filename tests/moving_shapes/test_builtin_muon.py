import pytest
import torch
from torch import nn

from nabla_attn.moving_shapes import loop
from nabla_attn.moving_shapes.loop import FloatMuon, MuonWithAdamW
from nabla_attn.moving_shapes.recipe import MuonConfig

CONFIG = MuonConfig(muon_lr=0.1, adamw_lr=0.01)


@pytest.fixture(params=[True, False], ids=["bfloat16", "float32"])
def muon(request, monkeypatch):
    """The optimiser of matrices on a CPU with and without instructions for bfloat16."""
    monkeypatch.setattr(loop, "computes_bfloat16", lambda device: request.param)
    return torch.optim.Muon if request.param else FloatMuon


def test_a_convolution_is_stepped_as_a_matrix(muon):
    torch.manual_seed(0)
    conv = nn.Conv3d(4, 6, 3)
    matrix = nn.Parameter(conv.weight.detach().flatten(1).clone())
    bias = conv.bias.detach().clone()
    optimizer = MuonWithAdamW(conv, lambda name, p: p.ndim > 1, CONFIG)
    plain = muon([matrix], lr=0.05, weight_decay=0.0)
    for _ in range(3):
        gradient = torch.randn_like(matrix)
        matrix.grad = gradient.clone()
        plain.step()
        conv.weight.grad = gradient.view_as(conv.weight).clone()
        conv.bias.grad = torch.ones_like(bias)
        optimizer.step(scale=0.5)
    assert torch.equal(conv.weight.flatten(1), matrix)
    assert torch.allclose(conv.bias, bias - 3 * 0.005, atol=1e-5)
    assert conv.weight.grad is None


def test_parameters_without_gradient_stay():
    layer = nn.Linear(4, 4)
    before = layer.weight.detach().clone()
    optimizer = MuonWithAdamW(layer, lambda name, p: p.ndim > 1, CONFIG)
    layer.bias.grad = torch.ones(4)
    optimizer.step(1.0)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (16, 16)])
def test_products_in_float32_step_as_those_in_bfloat16(shape):
    torch.manual_seed(0)
    start = torch.randn(shape)
    steps = {}
    for kind in (torch.optim.Muon, FloatMuon):
        noise = torch.Generator().manual_seed(1)
        weight = nn.Parameter(start.clone())
        optimizer = kind([weight], lr=0.1, weight_decay=0.01)
        for _ in range(4):
            weight.grad = torch.randn(shape, generator=noise)
            optimizer.step()
        steps[kind] = weight.detach() - start
    near, exact = steps.values()
    assert (near - exact).norm() < 0.02 * exact.norm()


def test_a_step_is_about_orthogonal():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(6, 20))
    optimizer = FloatMuon([weight], lr=1.0, weight_decay=0.0)
    weight.grad = torch.randn(6, 20)
    optimizer.step()
    singular = torch.linalg.svdvals(weight.detach())
    assert singular.min() > 0.6 and singular.max() < 1.3
