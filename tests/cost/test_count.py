"""Work counted op by op, without computing anything."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from nabla_attn.cost.attention import attention_work
from nabla_attn.cost.count import count
from nabla_attn.cost.work import MatrixShape, Work, total


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def one(module, *shapes):
    work = count(module, *shapes)
    assert not work.unknown and len(work.operators) == 1, work
    return work


def test_a_convolution():
    work = one(nn.Conv2d(3, 20, 5, stride=2, padding=2, bias=False), (2, 3, 9, 9))
    pixels = 2 * 5 * 5
    assert work.matrix == pixels * 3 * 20 * 25
    # 50 pixels, 3 and 20 channels in tiles of 16.
    assert work.issued() == 64 * 16 * 32 * 25
    assert work.issued(8, 1) == 50 * 8 * 24 * 25
    assert work.moved == 2 * 3 * 81 + pixels * 20
    assert (work.weights, work.vector, work.kernels) == (3 * 20 * 25, 0, 1)


def test_groups_and_depthwise():
    grouped = one(nn.Conv2d(32, 64, 3, padding=1, groups=2, bias=False), (1, 32, 4, 4))
    assert grouped.matrix == 16 * 16 * 64 * 9 == grouped.issued()
    depthwise = one(nn.Conv2d(32, 64, 3, padding=1, groups=32, bias=False), (1, 32, 4, 4))
    assert depthwise.matrix == 0 and depthwise.vector == 16 * 64 * 9


def test_a_transposed_convolution_multiplies_its_input():
    work = one(nn.ConvTranspose2d(16, 32, 2, stride=2, bias=False), (1, 16, 4, 4))
    assert work.matrix == 16 * 16 * 32 * 4


def test_products():
    work = one(nn.Linear(48, 10), (7, 48))
    assert work.matrix == 7 * 48 * 10 and work.weights == 480
    assert work.moved == 7 * 48 + 7 * 10
    batched = one(Apply(torch.bmm), (4, 5, 6), (4, 6, 7))
    assert batched.matrix == 4 * 5 * 6 * 7 and batched.weights == 0
    assert batched.moved == 4 * (30 + 42 + 35)


def test_attention_of_pytorch_counts_as_ours():
    q, kv = (2, 3, 32, 16), (2, 3, 48, 16)
    work = count(Apply(functional.scaled_dot_product_attention), q, kv, kv)
    assert not work.unknown
    assert work.matrix == 2 * 3 * 32 * 48 * 16 * 2
    own = attention_work(32, 6, 16)
    same = count(Apply(functional.scaled_dot_product_attention), q, q, q)
    assert own.matrix == same.matrix and own.vector <= same.vector


@pytest.mark.parametrize(
    ("function", "vector", "moved"),
    [
        (torch.relu, 24, 0),
        (lambda x: x + 1, 24, 0),
        (lambda x: x + x, 24, 24),
        (functional.silu, 5 * 24, 0),
        (functional.gelu, 6 * 24, 0),
        (lambda x: x.mean((2, 3)), 24, 24),
        (lambda x: functional.max_pool2d(x, 2), 4 * 6, 24 + 6),
        (lambda x: torch.cat([x, x], 1), 0, 2 * 48),
        (lambda x: x.view(1, -1).transpose(0, 1), 0, 0),
        (nn.BatchNorm2d(6), 0, 0),
    ],
)
def test_other_operators(function, vector, moved):
    work = count(Apply(function), (1, 6, 2, 2))
    assert not work.unknown
    assert (work.vector, work.moved, work.matrix) == (vector, moved, 0)


def test_unknown_operators_are_named():
    work = count(Apply(lambda x: torch.relu(torch.special.bessel_j0(x))), (3,))
    assert work.unknown == {"special_bessel_j0": 1} and work.vector == 3
    both = total([work, work])
    assert both.unknown == {"special_bessel_j0": 2} and both.vector == 6
    assert work.to_dict()["unknown"] == {"special_bessel_j0": 1}


def test_the_module_is_left_as_it_was():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout()).train()
    net[2].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    work = count(net, torch.randn(1, 3, 8, 8))
    assert work.matrix == 3 * 4 * 64
    assert [module.training for module in net] == [True, True, False]
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]) and value.device.type == "cpu"


def test_tied_weights_are_counted_at_each_use():
    layer = nn.Linear(4, 4, bias=False)
    assert count(nn.Sequential(layer, layer), (1, 4)).matrix == 32


def test_a_module_that_fails_gets_its_mode_back():
    net = nn.Linear(3, 3).train()
    with pytest.raises(RuntimeError):
        count(net, (1, 4))
    assert net.training


def test_plain_mem():
    assert Work().mem == 0
    work = one(nn.Conv2d(16, 16, 1, bias=False), (1, 16, 4, 4))
    assert work.mem == 16**3 / 512
    padded = one(nn.Conv2d(8, 16, 1, bias=False), (1, 8, 4, 4))
    assert padded.mem == 0.5 * (16**3 / 2) / 384


def test_padding_never_lessens_work():
    shape = MatrixShape(2, 17, 3, 33, 9)
    sizes = [shape.macs(tile, tile) for tile in (1, 8, 16, 32)]
    assert sizes == sorted(sizes) and sizes[0] == 2 * 17 * 3 * 33 * 9


def test_sparse_attention_has_less_matrix_work_and_a_map():
    dense, sparse = attention_work(4096, 2, 64), attention_work(4096, 2, 64, 0.25)
    scores = 2 * 64 * 64 * 64
    assert sparse.matrix == dense.matrix / 4 + scores
    assert sparse.kernels == 3 and dense.kernels == 1
    assert sparse.vector > dense.vector / 4
    assert sparse.moved > dense.moved
    with pytest.raises(ValueError, match="density"):
        attention_work(64, 1, 64, 0)
