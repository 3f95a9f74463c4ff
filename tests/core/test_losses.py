import pytest
import torch

from nabla_attn import TokenGrid, parse
from nabla_attn.block_selection import select_blocks
from nabla_attn.core import losses as losses_module
from nabla_attn.core.losses import BlockCall, measure_losses
from nabla_attn.core.order import TokenLayout, to_blocks


def call_of(q, k, v, grid, config, text_after=0, text_valid=None):
    layout = TokenLayout(grid, 0, text_after)
    q, k, v = (to_blocks(x, layout) for x in (q, k, v))
    block_map = select_blocks(q, k, layout, parse(config), text_valid=text_valid)
    return BlockCall(q, k, v, layout, block_map, q.shape[-1] ** -0.5)


def random_qkv(tokens, heads=2, dim=8, spread=2.0):
    return [spread * torch.randn(1, heads, tokens, dim) for _ in range(3)]


GRID = TokenGrid(frames=3, height=11, width=13)  # ragged on both sides


def exact(q, k, v, grid, config):
    """True kept mass and output error over all tokens, in raster order and without any padding."""
    call = call_of(q, k, v, grid, config)
    height, width = -(-grid.height // 8), -(-grid.width // 8)
    t, y, x = torch.meshgrid(
        torch.arange(grid.frames),
        torch.arange(grid.height),
        torch.arange(grid.width),
        indexing="ij",
    )
    block = ((t * height + y // 8) * width + x // 8).flatten()
    keep = call.block_map.mask[0][:, block][:, :, block]
    probs = (q[0] @ k[0].transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    mass = (probs * keep).sum(-1)
    dense, sparse = probs @ v[0], (probs * keep) @ v[0] / mass[..., None]
    return mass.mean(-1), ((sparse - dense).norm(dim=-1) / dense.norm(dim=-1)).mean(-1)


@pytest.mark.parametrize("config", ["nabla-0.5", "topk-0.3", "sta-1-3-3", "nabla-0.3_sta-3-1-1"])
def test_losses_equal_attention_without_blocks_and_padding(config):
    # Padded slots would take probability mass if they were not masked (XAttention's padded keys).
    q, k, v = random_qkv(GRID.num_tokens)
    losses = measure_losses(call_of(q, k, v, GRID, config), num_rows=10_000)
    mass, error = exact(q, k, v, GRID, config)
    torch.testing.assert_close(losses.true_mass, mass, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses.output_error, error, atol=1e-4, rtol=1e-4)
    assert (losses.best_mass >= losses.true_mass - 1e-6).all()


def test_padded_keys_hold_no_mass_whatever_they_contain():
    q, k, v = random_qkv(GRID.num_tokens)
    call = call_of(q, k, v, GRID, "nabla-0.5")
    clean = measure_losses(call)
    empty = ~call.block_map.kv_valid[0]
    assert empty.any()
    call.k[:, :, empty] = 1e4
    poisoned = measure_losses(call)
    torch.testing.assert_close(clean.true_mass, poisoned.true_mass)


def test_everything_kept_loses_nothing():
    q, k, v = random_qkv(GRID.num_tokens)
    losses = measure_losses(call_of(q, k, v, GRID, "nabla-1"))
    torch.testing.assert_close(losses.true_mass, torch.ones(2))
    torch.testing.assert_close(losses.best_mass, torch.ones(2))
    assert losses.output_error.max() < 1e-5


def test_true_mass_is_not_the_pooled_mass():
    # One key in a block draws all attention, and its block's mean hides it.
    grid = TokenGrid(frames=1, height=8, width=24)
    q = torch.zeros(1, 1, 192, 4)
    q[..., 0] = 1
    k = torch.zeros(1, 1, 192, 4)
    k[0, 0, :, 0] = 0.0
    rows = torch.arange(192).view(8, 24)
    k[0, 0, rows[:, :8].flatten(), 0] = 1.0  # a block that looks good on average
    k[0, 0, rows[0, 8], 0], k[0, 0, rows[1, 8], 0] = 60.0, -70.0  # a peak that the mean hides
    call = call_of(q, k, torch.randn(1, 1, 192, 4), grid, "topk-0.34")
    call.block_map.mask[0, 0] = torch.tensor([True, False, False])
    losses = measure_losses(call)
    assert losses.true_mass.item() < 0.01
    assert losses.best_mass.item() > 0.99


def test_kept_mass_below_what_floats_hold_is_a_whole_error():
    grid = TokenGrid(frames=1, height=8, width=16)
    q = torch.ones(1, 1, 128, 4)
    k = torch.full((1, 1, 128, 4), -300.0)
    k[0, 0, torch.arange(128).view(8, 16)[:, 8:].flatten()] = 0.0
    call = call_of(q, k, torch.randn(1, 1, 128, 4), grid, "topk-0.5")
    call.block_map.mask[0, 0] = torch.tensor([True, False])
    losses = measure_losses(call)
    assert losses.true_mass.item() == 0
    assert losses.output_error.item() == pytest.approx(1)


def test_text_that_is_padding_takes_no_mass():
    grid, text = TokenGrid(frames=2, height=8, width=8), 70
    q, k, v = random_qkv(grid.num_tokens + text)
    valid = torch.ones(1, text, dtype=torch.bool)
    valid[:, 40:] = False
    call = call_of(q, k, v, grid, "nabla-0.5", text, valid)
    short = [x[:, :, : grid.num_tokens + 40] for x in (q, k, v)]
    clean = measure_losses(call_of(*short, grid, "nabla-0.5", 40), num_rows=1000)
    torch.testing.assert_close(measure_losses(call, num_rows=1000).true_mass, clean.true_mass)


def test_in_parts_as_at_once(monkeypatch):
    q, k, v = random_qkv(GRID.num_tokens, heads=5)
    call = call_of(q, k, v, GRID, "nabla-0.5")
    whole = measure_losses(call)
    monkeypatch.setattr(losses_module, "MAX_SCORES", 1)
    parts = measure_losses(call)
    torch.testing.assert_close(whole.true_mass, parts.true_mass)
    torch.testing.assert_close(whole.output_error, parts.output_error)
