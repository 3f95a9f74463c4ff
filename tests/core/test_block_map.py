import pytest
import torch
from tests.oracle import ODD_GRIDS, random_qkv, token_mask

import nabla_attn as na
from nabla_attn.core.block_map import block_map_of
from nabla_attn.core.order import TokenLayout


@pytest.mark.parametrize("grid", ODD_GRIDS.values(), ids=ODD_GRIDS.keys())
@pytest.mark.parametrize("text", [(0, 0), (3, 0), (0, 70)], ids=["video", "before", "after"])
def test_density_counts_real_token_pairs(grid, text):
    layout = TokenLayout(grid, *text)
    q, k, _ = random_qkv(grid, batch=3, num_text=sum(text))
    bmap = na.build_block_map(
        q, k, grid, na.parse("nabla-0.4"), text_before=text[0], text_after=text[1]
    )
    assert bmap.density == pytest.approx(token_mask(bmap, layout).float().mean().item(), abs=1e-6)


def test_text_padding_is_not_counted_and_not_attended():
    grid = na.TokenGrid(2, 8, 8)
    valid = torch.tensor([[True] * 5, [True, True, False, False, False]])
    q, k, _ = random_qkv(grid, batch=2, num_text=5)
    bmap = na.build_block_map(q, k, grid, na.parse("nabla-0.3"), text_after=5, text_valid=valid)
    assert bmap.kv_counts.tolist() == [[64, 64, 5], [64, 64, 2]]
    mask = token_mask(bmap, TokenLayout(grid, 0, 5))
    assert not mask[1, :, :, -3:].any()
    assert mask[0, :, :, -5:].all() and mask[1, :, :, -5:-3].all()
    assert mask[0, :, -5:].all()


@pytest.mark.parametrize("grid", ODD_GRIDS.values(), ids=ODD_GRIDS.keys())
def test_block_mask_is_the_map(grid):
    q, k, _ = random_qkv(grid, batch=2, heads=3)
    bmap = na.build_block_map(q, k, grid, na.parse("nabla-0.5_sta-1-3-3"))
    block_mask = bmap.to_block_mask()
    assert torch.equal(block_mask.to_dense().bool(), bmap.mask)
    (num, index), (full_num, full_index), *_ = bmap.flex_tables()
    whole = bmap.kv_counts[0] == bmap.block_tokens
    assert torch.equal(num, (bmap.mask & ~whole).sum(-1, dtype=torch.int32))
    for counts, table in ((num, index), (full_num, full_index)):
        for row, count in zip(table.flatten(0, 2), counts.flatten(), strict=True):
            kept = row[:count].tolist()
            assert kept == sorted(set(kept))
    assert index.data_ptr() != full_index.data_ptr()
    assert block_mask.q_indices is None


def test_union_is_a_superset():
    grid = na.TokenGrid(2, 16, 16)
    q, k, _ = random_qkv(grid)
    bmap = na.build_block_map(q, k, grid, na.parse("nabla-0.3"))
    other = torch.rand(8, 8) > 0.5
    joined = bmap.union(other)
    assert (bmap.mask <= joined.mask).all() and (other <= joined.mask).all()


def test_text_valid_must_fit():
    layout = TokenLayout(na.TokenGrid(1, 8, 8), 0, 4)
    mask = torch.ones(2, 1, 1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"\[batch, text tokens\] = \(2, 4\): got \(2, 3\)"):
        block_map_of(mask, layout, torch.ones(2, 3, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_density_under_autocast_is_the_density(dtype):
    # One query block that keeps 1,029 of 1,100 key blocks: more tokens than fp16 can count.
    mask = torch.ones(1, 1, 1, 1100, dtype=torch.bool)
    mask[..., :71] = False
    bmap = na.BlockMap(mask, torch.tensor([64]), None, 64)
    with torch.autocast("cpu", dtype=dtype):
        assert bmap.density == pytest.approx(1029 / 1100, abs=1e-6)
