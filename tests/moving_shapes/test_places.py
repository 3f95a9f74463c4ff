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
    found = places(grid).view(*grid, 3, NUM_PLACES // 3)
    for axis, length in enumerate(grid):
        along = found[..., axis, :].movedim(axis, 0)
        assert (along == along[:, :1, :1]).all(), "the other axes change nothing"
        share = (torch.arange(length) + 0.5) / length
        half, whole, eighths = (along[:, 0, 0, index] for index in (0, 1, 6))
        assert torch.allclose(half, torch.cos(torch.pi * share))
        assert torch.allclose(whole, torch.cos(2 * torch.pi * share), atol=1e-6)
        assert torch.allclose(eighths, torch.sin(8 * torch.pi * share), atol=1e-5)


def test_every_token_of_a_frame_has_numbers_of_its_own():
    found = places((9, 32, 32))
    assert found.abs().max() <= 1 and len(found.unique(dim=0)) == len(found)


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


def test_the_loss_is_the_error_of_the_last_call():
    model = build_transformer(0)
    grid = (2, 3, 4)
    with place_probe(model) as probe, torch.no_grad():
        model.place_probe.bias.fill_(2)
        call(model, grid)
        error = (2 - places(grid)).square().mean()
        assert probe.loss(grid) == pytest.approx(error.item(), rel=1e-5)
