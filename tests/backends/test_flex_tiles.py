"""Query tiles of several blocks: the tables mean the same map; options come from tables."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tests.oracle import ODD_GRIDS, masked_attention, random_qkv, token_mask
from torch._subclasses.fake_tensor import FakeTensorMode

import nabla_attn as na
from nabla_attn import backends
from nabla_attn.backends import flex, flex_options, gather
from nabla_attn.backends.flex_options import FlexOptions, choose_options
from nabla_attn.core.flex_tables import build_block_mask, build_layout_tables
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
    tables = bmap.flex_tables(rows, needs_backward=True)
    block_mask = build_block_mask(tables, bmap.block_tokens, rows_per_tile=rows)
    block = bmap.block_tokens
    expected = bmap.mask.repeat_interleave(block, -1).repeat_interleave(block, -2)
    expected = expected & bmap.kv_valid[:, None, None, :]
    assert (rows * block, block) == block_mask.BLOCK_SIZE
    assert torch.equal(attended(block_mask, expected.shape), expected)
    # The backward reads the same pairs of tiles by key block.
    for table, transposed in zip((tables.partial, tables.full), tables.transposed, strict=True):
        num_tiles, num_columns = table.columns.shape[-2:]
        assert torch.equal(as_mask(table, num_columns), as_mask(transposed, num_tiles).mT)


@grids
@pytest.mark.parametrize("num_text", [0, 5])
def test_tables_of_a_layout_equal_the_map(grid, num_text):
    text = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool() if num_text else None
    q, k, _ = random_qkv(grid, batch=2, num_text=num_text)
    options = {"text_after": num_text, "text_valid": text}
    bmap = na.build_block_map(q, k, grid, na.parse("nabla-0.5"), **options)
    facts = (bmap.mask, bmap.kv_valid, bmap.block_tokens, bmap.order)
    tables = build_layout_tables(*facts, needs_backward=True)
    block = bmap.block_tokens
    expected = bmap.mask.repeat_interleave(block, -1).repeat_interleave(block, -2)
    expected = expected & (True if bmap.kv_valid is None else bmap.kv_valid[:, None, None, :])
    block_mask = build_block_mask(tables, block)
    assert torch.equal(attended(block_mask, expected.shape), expected)
    # Only blocks that the layout says may be masked are, and both kinds make up the map.
    partial, full = (as_mask(each, bmap.mask.shape[2]).mT for each in tables.transposed)
    assert torch.equal(partial, bmap.mask & bmap.order.is_masked)
    assert torch.equal(full, bmap.mask & ~bmap.order.is_masked)
    # They come in ascending order, which reads memory forwards.
    for counts, columns in (tables.partial, tables.full, *tables.transposed):
        for row, count in zip(columns.flatten(0, 2), counts.flatten(), strict=True):
            kept = row[:count].tolist()
            assert kept == sorted(set(kept))


def as_mask(table, num_columns):
    kept = torch.arange(table.columns.shape[-1]) < table.counts[..., None]
    columns = torch.where(kept, table.columns, num_columns).long()
    mask = torch.zeros(*table.counts.shape, num_columns + 1, dtype=torch.bool)
    return mask.scatter_(-1, columns, True)[..., :num_columns]


def test_no_table_is_sorted(monkeypatch):
    # Training at 720p sorted two tables of 40 x 1260 x 1260 in every layer.
    for name in ("sort", "argsort"):
        monkeypatch.setattr(torch, name, lambda *_, **__: pytest.fail("a table was sorted"))
    q, k, _ = random_qkv(ODD_GRIDS["ragged"])
    bmap = na.build_block_map(q, k, ODD_GRIDS["ragged"], na.parse("nabla-0.5"))
    tables = bmap.flex_tables(needs_backward=True)
    assert build_block_mask(tables, bmap.block_tokens).full_q_indices is not None


@pytest.mark.parametrize("grid", [ODD_GRIDS["exact"], na.TokenGrid(3, 8, 24)], ids=["even", "odd"])
def test_full_tiles_are_those_that_all_rows_keep(grid):
    q, k, _ = random_qkv(grid)
    for pair in (None, "union", "pool"):
        config = na.SparseConfig(threshold=0.5, pair_queries=pair)
        bmap = na.build_block_map(q, k, grid, config)
        (partial, _), (full, _), *_ = bmap.flex_tables(2)
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
    union = na.build_block_map(q, k, grid, f"{algorithm}_pair-union").mask
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
    pooled = na.build_block_map(q, k, grid, "nabla-0.5_pair-pool").mask
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
        na.build_block_map(x, k, grid, f"nabla-0.3_pair-{pair}").mask[:, :, :3] for x in (q, other)
    )
    assert torch.equal(first, second)


def test_unknown_pairing_is_named():
    with pytest.raises(ValueError, match="unknown pair_queries 'both'; expected None or one of"):
        na.SparseConfig(threshold=0.5, pair_queries="both")
    with pytest.raises(ValueError, match=r"'pair-both' in 'nabla-0.5_pair-both' is not"):
        na.parse("nabla-0.5_pair-both")


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


@pytest.fixture
def on(monkeypatch):
    """Stands for queries on a GPU of some architecture."""

    def queries(architecture, *, dtype=torch.bfloat16, dim=128, slots=640):
        capability, memory = {
            "sm_80": ((8, 0), 166_912),
            "sm_89": ((8, 9), 101_376),
            "sm_90": ((9, 0), 232_448),
            "sm_100": ((10, 0), 232_448),
            "sm_120": ((12, 0), 101_376),
        }[architecture]
        properties = SimpleNamespace(shared_memory_per_block_optin=memory)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        shape = (1, 1, slots, dim)
        return SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=shape)

    return queries


def kernel(q, block_tokens, rows=1, **options):
    return flex_options._fitted(FlexOptions(rows, options), q, block_tokens).kernel


def test_on_a_gpu_nothing_tuned_still_fits_the_blocks(on):
    q = on("sm_90")
    assert {"BLOCK_M": 64, "BLOCK_N": 64}.items() <= kernel(q, 64).items()
    assert {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8}.items() <= kernel(
        q, 64, 2, num_warps=8
    ).items()
    assert {"BLOCK_M": 128, "BLOCK_N": 64}.items() <= kernel(q, 128).items()
    # Three frames of 8x8.
    assert {"BLOCK_M": 64, "BLOCK_N": 64}.items() <= kernel(q, 192).items()
    assert {"BLOCK_M": 64, "BLOCK_N": 64}.items() <= kernel(q, 64, 3).items()


def test_a_warp_works_on_16_rows_of_a_tile(on):
    q = on("sm_90")
    assert kernel(q, 64)["fwd_num_warps"] == 4
    assert kernel(q, 48)["fwd_num_warps"] == 1
    assert kernel(q, 64, 2)["fwd_num_warps"] == 8
    # Without tensor cores the product itself takes the registers.
    single = on("sm_80", dtype=torch.float32)
    assert kernel(single, 64)["fwd_num_warps"] == 4


def test_tiles_in_float32_stay_in_registers(on):
    small = {"BLOCK_M": 32, "BLOCK_N": 32}
    assert small.items() <= kernel(on("sm_80", dtype=torch.float32), 64).items()
    assert small.items() <= kernel(on("sm_90", dtype=torch.float32), 128).items()
    # Tiles of 64 would spill on sm_89 and sm_120 even with heads of 64 dims.
    assert small.items() <= kernel(on("sm_89", dtype=torch.float32, dim=64), 64).items()


def test_tall_tiles_have_the_stages_that_fit_in_shared_memory(on):
    assert kernel(on("sm_90"), 64, 2)["fwd_num_stages"] == 3
    assert kernel(on("sm_89"), 64, 2)["fwd_num_stages"] == 2
    assert kernel(on("sm_89", dim=64), 64, 2)["fwd_num_stages"] == 3
    # 96 dims take the memory of 128.
    assert kernel(on("sm_89", dim=96), 64, 2)["fwd_num_stages"] == 2


def test_whole_tiles_are_known_to_be_whole_at_any_length(on):
    assert kernel(on("sm_90", slots=5 * 64), 64)["IS_DIVISIBLE"]
    # Five blocks of 64 end in half a tile of 128.
    assert not kernel(on("sm_90", slots=5 * 64), 64, 2)["IS_DIVISIBLE"]
    assert kernel(on("sm_90", slots=6 * 64), 64, 2)["IS_DIVISIBLE"]
    # A tile of three rows of 64 reaches beyond 256 queries, although they are a multiple of 128.
    assert not kernel(on("sm_90", slots=4 * 64), 64, 3)["IS_DIVISIBLE"]


@pytest.mark.parametrize("tokens", [25, 40, 1560])
def test_blocks_below_a_tile_of_16_are_refused_on_a_gpu(tokens, monkeypatch):
    monkeypatch.setattr("nabla_attn.backends.flex.why_not_compile", lambda device: None)
    cuda = torch.device("cuda")
    reason = backends.why_not("flex", cuda, block_tokens=tokens)
    assert f"needs blocks of a multiple of 16 tokens: got {tokens}" in reason
    assert backends.why_not("flex", torch.device("cpu"), block_tokens=tokens) is None


def test_the_backward_on_a_gpu_has_no_tiles_below_32(monkeypatch):
    monkeypatch.setattr("nabla_attn.backends.flex.why_not_compile", lambda device: None)
    why_not = partial(backends.why_not, "flex", torch.device("cuda"), dtype=torch.bfloat16)
    for tokens in (16, 48, 144):
        assert why_not(block_tokens=tokens) is None
        reason = why_not(block_tokens=tokens, needs_grad=True)
        assert f"backward on CUDA needs blocks of a multiple of 32 tokens: got {tokens}" in reason
    assert why_not(block_tokens=96, needs_grad=True) is None
    # In fp32 the backward's only tiles have 16 rows.
    single = partial(backends.why_not, "flex", torch.device("cuda"), dtype=torch.float32)
    assert single(block_tokens=48, needs_grad=True) is None


def test_flex_refuses_what_its_gpu_kernels_do_not_take(monkeypatch):
    monkeypatch.setattr("nabla_attn.backends.flex.why_not_compile", lambda device: None)
    why_not = partial(backends.why_not, "flex", torch.device("cuda"))
    assert "at least 16 dims: got 8" in why_not(head_dim=8)
    assert "no float64" in why_not(dtype=torch.float64)
    assert why_not(dtype=torch.float16, head_dim=96, block_tokens=64) is None


def test_auto_takes_the_fallback_where_flex_has_no_kernel_and_says_so(monkeypatch):
    monkeypatch.setattr("nabla_attn.backends.flex.why_not_compile", lambda device: None)
    backends._warn_of_fallback.cache_clear()
    with FakeTensorMode():
        q = torch.empty(1, 2, 80, 64, device="cuda")
        assert backends.resolve("auto", q, q, q, block_tokens=64) is flex.attend
        with pytest.warns(UserWarning, match=r"'auto' runs 'gather'.*of 16 tokens: got 40"):
            assert backends.resolve("auto", q, q, q, block_tokens=40) is gather.attend
        with pytest.raises(RuntimeError, match=r"'flex' cannot run.*got 40.*backend='gather'"):
            backends.resolve("flex", q, q, q, block_tokens=40)


def test_backwards_are_autotuned_only_where_the_default_tile_does_not_divide_the_blocks(on):
    def autotuned(architecture, **what):
        return flex_options.needs_autotuning(on(architecture, **what), 64)

    assert [a for a in ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120") if autotuned(a)] == [
        "sm_90",
        "sm_100",
    ]
    assert autotuned("sm_80", dim=32) and not autotuned("sm_90", dim=32)
    assert not autotuned("sm_90", dtype=torch.float32)
    assert flex_options.needs_autotuning(on("sm_80"), 96)
    assert not flex_options.needs_autotuning(on("sm_90"), 128)
    assert not flex_options.needs_autotuning(torch.zeros(1, 1, 1, 64), 64)


def test_flash_runs_only_where_it_keeps_to_the_map(on, monkeypatch):
    monkeypatch.setattr(flex_options, "find_spec", lambda name: name)

    def reason(architecture, tokens=128, rows=1):
        return flex_options.why_not_flash(on(architecture).device, tokens, rows)

    assert reason("sm_90") is None
    assert "on sm_90 and sm_100 only: got sm_80" in reason("sm_80")
    assert "got sm_120" in reason("sm_120")
    assert "key blocks of 128 tokens: got 64" in reason("sm_90", tokens=64)
    assert "tiles of 256 queries: got 128" in reason("sm_100")
    assert reason("sm_100", rows=2) is None


def test_what_does_not_fit_is_refused():
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
    for text in ('{"rows": [{}]}', '{"rows": 1}', "[]", "[" * 10**5, '{"rows": [[1]]}'):
        flex_options.tuned_file(CPU).write_text(text)
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
