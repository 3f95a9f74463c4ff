"""Query tiles of several blocks: the tables mean the same map; options come from tables."""

import json

import pytest
import torch
from tests.oracle import ODD_GRIDS, masked_attention, random_qkv, token_mask

import nabla_attn as na
from nabla_attn.backends import flex, flex_options
from nabla_attn.backends.flex_options import FlexOptions, choose_options
from nabla_attn.core.block_map import build_block_mask
from nabla_attn.core.order import TokenLayout

grids = pytest.mark.parametrize("grid", ODD_GRIDS.values(), ids=ODD_GRIDS.keys())
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NABLA_ATTN_CACHE", str(tmp_path))
    flex_options.forget_tables()
    yield
    flex_options.forget_tables()


def attended(block_mask, shape):
    """Slot pairs [batch, heads, q, kv] that FlexAttention's tables and mask let through."""
    tile, block = block_mask.BLOCK_SIZE
    ids = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
    masked = block_mask.mask_mod(*ids)
    result = torch.zeros(shape, dtype=torch.bool)
    kinds = (
        (block_mask.kv_num_blocks, block_mask.kv_indices, masked),
        (block_mask.full_kv_num_blocks, block_mask.full_kv_indices, torch.ones_like(masked)),
    )
    for counts, index, allowed in kinds:
        for b, h, row in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
            for column in index[b, h, row, : counts[b, h, row]].tolist():
                part = (b, h, slice(row * tile, row * tile + tile))
                keys = slice(column * block, column * block + block)
                assert not result[part][:, keys].any(), "a block is in both tables"
                result[part][:, keys] = allowed[part][:, keys]
    return result


@grids
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_tables_equal_the_map(grid, rows):
    text = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    q, k, _ = random_qkv(grid, batch=2, num_text=5)
    options = {"text_after": 5, "text_valid": text}
    bmap = na.build_block_map(q, k, grid, na.parse("nabla-0.5"), **options)
    mask = bmap.mask if rows > 1 else None
    tables = bmap.flex_tables(rows)
    block_mask = build_block_mask(*tables, bmap.block_tokens, rows_per_tile=rows, mask=mask)
    block = bmap.block_tokens
    expected = bmap.mask.repeat_interleave(block, -1).repeat_interleave(block, -2)
    expected = expected & bmap.kv_valid[:, None, None, :]
    assert (rows * block, block) == block_mask.BLOCK_SIZE
    assert torch.equal(attended(block_mask, expected.shape), expected)


@pytest.mark.parametrize("grid", [ODD_GRIDS["exact"], na.TokenGrid(3, 8, 24)], ids=["even", "odd"])
def test_full_tiles_are_those_that_all_rows_keep(grid):
    q, k, _ = random_qkv(grid)
    for pair, config in ((None, "nabla-0.5"), ("union", "nabla-0.5"), ("pool", "nabla-0.5")):
        bmap = na.build_block_map(q, k, grid, na.parse(config), pair_queries=pair)
        partial, _, full, _, _ = bmap.flex_tables(2)
        if pair is None:
            assert partial.sum() > 0
        else:
            assert partial.sum() == 0
            assert torch.equal(full, bmap.mask[:, :, ::2].sum(-1, dtype=torch.int32))


@grids
@pytest.mark.parametrize("algorithm", ["nabla-0.5", "sta-1-3-3", "nabla-0.4_sta-1-1-1", "topk-0.3"])
def test_a_union_is_a_superset_shared_by_pairs(grid, algorithm):
    q, k, _ = random_qkv(grid)
    config = na.parse(algorithm)
    own = na.build_block_map(q, k, grid, config).mask
    union = na.build_block_map(q, k, grid, config, pair_queries="union").mask
    last = own.shape[2] // 2 * 2
    both = own[:, :, 0:last:2] | own[:, :, 1:last:2]
    if grid.segments is None:
        assert torch.equal(union[:, :, 0:last:2], both)
        assert torch.equal(union[:, :, 1:last:2], both)
    else:
        clips = na.build_block_map(q, k, grid, na.parse("nabla-1")).mask
        assert not (union & ~clips).any()
    assert not (own & ~union).any()
    assert torch.equal(union[:, :, last:], own[:, :, last:])


def test_pooled_pairs_are_maps_of_taller_blocks():
    # 8x16 query blocks in one row of blocks: the pairs of 8x8 ones.
    grid = na.TokenGrid(3, 8, 32)
    wide = na.TokenGrid(3, 8, 32, block=na.BlockShape(1, 8, 16))
    q, _, _ = random_qkv(grid)
    k = random_qkv(grid)[1]
    pooled = na.build_block_map(q, k, grid, na.parse("nabla-0.5"), pair_queries="pool").mask
    tall_q = na.to_blocks(q, wide).unflatten(2, (-1, 128)).mean(3)
    blocks_k = na.to_blocks(k, grid).unflatten(2, (-1, 64)).mean(3)
    from nabla_attn.core.scores import score_blocks
    from nabla_attn.core.select import select_by_mass

    expected = select_by_mass(score_blocks(tall_q, blocks_k), 0.5)
    assert torch.equal(pooled[:, :, ::2], expected)


@pytest.mark.parametrize("pair", ["union", "pool"])
def test_pairs_do_not_span_clips(pair):
    # Three blocks a clip: the third of the first stands beside the first of the second.
    grid = na.TokenGrid(2, 8, 24, segments=(1, 1))
    q, k = 2 * torch.randn(2, 1, 8, grid.num_tokens, 16)
    other = q.clone()
    other[:, :, 192:] = 30 * torch.randn(1, 8, 192, 16)
    first, second = (
        na.build_block_map(x, k, grid, "nabla-0.3", pair_queries=pair).mask[:, :, :3]
        for x in (q, other)
    )
    assert torch.equal(first, second)


def test_unknown_pairing_is_named():
    q, k, _ = random_qkv(ODD_GRIDS["exact"])
    with pytest.raises(ValueError, match="unknown pair_queries 'both'; expected None or one of"):
        na.build_block_map(q, k, ODD_GRIDS["exact"], na.parse("nabla-0.5"), pair_queries="both")


def row(**changes):
    key = flex_options.key_of(torch.zeros(1, 1, 1, 16), 64, needs_backward=False)
    return {**key, "tile_rows": 2, "kernel_options": {"num_warps": 8}, **changes}


def test_options_come_from_override_then_machine_then_package(monkeypatch, tmp_path):
    q = torch.zeros(1, 1, 1, 16)
    assert choose_options(q, 64, needs_backward=False) == FlexOptions()
    package = tmp_path / "package.json"
    package.write_text(json.dumps({"rows": [row(tile_rows=4)]}))
    monkeypatch.setattr(flex_options, "TABLE", package)
    flex_options.forget_tables()
    assert choose_options(q, 64, needs_backward=False).tile_rows == 4
    assert choose_options(q, 64, needs_backward=True) == FlexOptions()
    assert choose_options(q.bfloat16(), 64, needs_backward=False) == FlexOptions()
    flex_options.tuned_file(CPU).write_text(json.dumps({"rows": [row()]}))
    flex_options.forget_tables()
    assert choose_options(q, 64, needs_backward=False) == FlexOptions(2, {"num_warps": 8})
    with flex_options.flex_options(FlexOptions(3)):
        assert choose_options(q, 64, needs_backward=False).tile_rows == 3
    assert choose_options(q, 64, needs_backward=False).tile_rows == 2


def test_a_cache_that_cannot_be_reached_has_no_table(monkeypatch):
    # As in the home of another user: not a missing file, but an error of the system.
    monkeypatch.setenv("NABLA_ATTN_CACHE", "/" + "x" * 5000)
    assert choose_options(torch.zeros(1, 1, 1, 16), 64, needs_backward=False) == FlexOptions()


def test_on_a_gpu_nothing_tuned_still_fits_the_blocks():
    cuda = torch.device("cuda")
    fitted = flex_options._fitted(FlexOptions(), cuda, 64)
    assert fitted.kernel == {"BLOCK_M": 64, "BLOCK_N": 64}
    fitted = flex_options._fitted(FlexOptions(2, {"num_warps": 8}), cuda, 64)
    assert fitted.kernel == {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8}
    assert flex_options._fitted(FlexOptions(), cuda, 128).kernel == {}
    # Three frames of 8x8.
    assert flex_options._fitted(FlexOptions(), cuda, 192).kernel == {"BLOCK_M": 64, "BLOCK_N": 64}
    fitted = flex_options._fitted(FlexOptions(3), cuda, 64)
    assert fitted.kernel == {"BLOCK_M": 64, "BLOCK_N": 64}


def test_what_does_not_fit_is_refused(tmp_path):
    q = torch.zeros(1, 1, 1, 16)
    with (
        flex_options.flex_options(FlexOptions(1, {"BLOCK_M": 128})),
        pytest.raises(ValueError, match="BLOCK_M=128 does not divide 64"),
    ):
        choose_options(q, 64, needs_backward=False)
    with (
        flex_options.flex_options(FlexOptions(1, {"BACKEND": "FLASH"})),
        pytest.raises(ValueError, match="FLASH' cannot run: flash-attn's kernels need CUDA"),
    ):
        choose_options(q, 128, needs_backward=False)
    with pytest.raises(ValueError, match="tile_rows must be a positive integer: got 0"):
        FlexOptions(0)
    flex_options.tuned_file(CPU).write_text('{"rows": [{}]}')
    flex_options.forget_tables()
    with pytest.raises(ValueError, match="is no table of flex options"):
        choose_options(q, 64, needs_backward=False)


def test_the_packages_table_is_readable_and_claims_nothing_unmeasured():
    for entry in flex_options.table_rows(flex_options.TABLE):
        assert entry["record"]


@pytest.mark.slow
def test_compiled_tiles_equal_float64():
    grid = ODD_GRIDS["ragged"]
    q, k, v = random_qkv(grid, num_text=3)
    bmap = na.build_block_map(q, k, grid, na.parse("nabla-0.4"), text_after=3)
    layout = TokenLayout(grid, 0, 3)
    exact = masked_attention(*(x.double() for x in (q, k, v)), token_mask(bmap, layout))
    blocks = [na.to_blocks(x, layout) for x in (q, k, v)]
    with torch.no_grad(), flex_options.flex_options(FlexOptions(2)):
        out = na.to_raster(flex.attend(*blocks, bmap), layout)
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=0)
