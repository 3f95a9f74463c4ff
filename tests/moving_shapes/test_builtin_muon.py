import torch
from torch import nn

from nabla_attn.moving_shapes.loop import MuonWithAdamW
from nabla_attn.moving_shapes.recipe import MuonConfig

CONFIG = MuonConfig(muon_lr=0.1, adamw_lr=0.01)


def test_a_convolution_is_stepped_as_a_matrix():
    torch.manual_seed(0)
    conv = nn.Conv3d(4, 6, 3)
    matrix = nn.Parameter(conv.weight.detach().flatten(1).clone())
    bias = conv.bias.detach().clone()
    optimizer = MuonWithAdamW(conv, lambda name, p: p.ndim > 1, CONFIG)
    plain = torch.optim.Muon([matrix], lr=0.05, weight_decay=0.0)
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
