"""What a GPU does with tokens whose heads lie together, run on a CPU: the results are the same."""

import pytest
import torch
from tests.oracle import ODD_GRIDS, random_qkv

import nabla_attn as na
from nabla_attn import attention, block_selection
from nabla_attn.core.block_map import BlockMap
from nabla_attn.core.order import TokenLayout, to_blocks

grids = pytest.mark.parametrize("grid", ODD_GRIDS.values(), ids=ODD_GRIDS.keys())
TEXT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Reordering and pooling in one pass, and one sample after another."""
    monkeypatch.setattr(block_selection, "has_whole_rows", lambda x: True)
    monkeypatch.setattr(block_selection, "fused", lambda run, *_, **__: lambda *x: run(*x))
    monkeypatch.setattr(attention, "_is_large", lambda *_: True)


@grids
def test_attention_is_the_same(grid, as_on_a_gpu, monkeypatch):
    q, k, v = random_qkv(grid, batch=2, num_text=5)
    options = {"text_after": 5, "text_valid": TEXT}
    with monkeypatch.context() as plain:
        plain.setattr(block_selection, "has_whole_rows", lambda x: False)
        plain.setattr(attention, "_is_large", lambda *_: False)
        expected = na.nabla_attention(q, k, v, grid, "nabla-0.5", **options)
    together = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    out = na.nabla_attention(*together, grid, "nabla-0.5", **options)
    torch.testing.assert_close(out, expected)
    # The next layer joins the heads without a copy.
    assert out.transpose(1, 2).is_contiguous()


@grids
def test_means_on_the_way_are_those_of_the_blocks(grid, as_on_a_gpu):
    q, k, _ = random_qkv(grid, batch=2, num_text=5)
    layout = TokenLayout(grid, 2, 3)
    blocks, means = block_selection.reorder_and_pool(q, k, layout=layout)
    for x, found, mean in zip((q, k), blocks, means, strict=True):
        assert torch.equal(found, to_blocks(x, layout))
        torch.testing.assert_close(mean, block_selection.pool_video(found, layout))


def test_gradients_take_the_plain_way(as_on_a_gpu):
    grid = ODD_GRIDS["ragged"]
    q, k, _ = (x.requires_grad_() for x in random_qkv(grid))
    blocks, means = block_selection.reorder_and_pool(q, k, layout=TokenLayout(grid))
    assert means == [] and blocks[0].requires_grad


@grids
@pytest.mark.parametrize("num_text", [0, 5])
def test_the_density_counts_whole_blocks(grid, num_text):
    q, k, _ = random_qkv(grid, batch=2, num_text=num_text)
    options = {"text_after": num_text, "text_valid": TEXT} if num_text else {}
    bmap = na.build_block_map(q, k, grid, "nabla-0.5", **options)
    assert bmap.order is not None
    token_by_token = BlockMap(bmap.mask, bmap.q_counts, bmap.kv_valid, bmap.block_tokens)
    assert torch.equal(bmap.head_density, token_by_token.head_density)
