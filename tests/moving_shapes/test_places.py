import pytest
import torch

from nabla_attn.moving_shapes.places import BLOCK, NUM_PLACES, place_probe, places
from nabla_attn.moving_shapes.transformer import build_transformer


def call(model, grid, batch=2):
    latents = torch.randn(batch, 16, *grid)
    text = torch.zeros(batch, 14, 64)
    return model(latents, torch.full((batch,), 1000.0), text, return_dict=False)[0]


@pytest.mark.parametrize("grid", [(1, 4, 4), (3, 5, 7), (2, 1, 3)])
def test_places_are_in_the_order_of_tokens(grid):
    found = places(grid).view(*grid, NUM_PLACES)
    frames, rows, columns = grid
    x, y, _, _, time = found.unbind(-1)
    assert torch.equal(x[0, 0], (2 * torch.arange(columns) + 1 - columns) / columns)
    assert torch.equal(y[0, :, 0], (2 * torch.arange(rows) + 1 - rows) / rows)
    assert torch.equal(time[:, 0, 0], (2 * torch.arange(frames) + 1 - frames) / frames)
    assert found.abs().max() < 1 and found[..., :2].mean((0, 1, 2)).abs().max() < 1e-6


def test_the_probe_teaches_the_blocks_before_it_and_leaves_no_trace():
    model = build_transformer(0)
    names = set(model.state_dict())
    with place_probe(model) as probe:
        assert set(model.state_dict()) - names == {"place_probe.weight", "place_probe.bias"}
        torch.nn.init.ones_(model.place_probe.weight[:, :7])
        call(model, (2, 4, 6))
        probe.loss((2, 4, 6)).backward()
    taught = [block.attn1.to_v.weight.grad is not None for block in model.blocks]
    assert taught == [index <= BLOCK for index in range(len(model.blocks))]
    assert set(model.state_dict()) == names
    call(model, (1, 2, 2))
    assert not model.blocks[BLOCK]._forward_hooks


def test_a_frame_alone_has_no_place_in_time():
    model = build_transformer(0)
    with place_probe(model) as probe, torch.no_grad():
        model.place_probe.weight.zero_()
        model.place_probe.bias.copy_(torch.tensor([0.0, 0, 0, 0, 100]))
        call(model, (1, 4, 4))
        alone = probe.loss((1, 4, 4))
        call(model, (2, 4, 4))
        both = probe.loss((2, 4, 4))
    assert alone < 1 and both > 9000
