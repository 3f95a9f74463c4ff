"""Laws of the composed attention."""

import itertools
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.oracle import ODD_GRIDS, random_qkv

import nabla_attn as na
from nabla_attn import backends, block_selection
from nabla_attn.config import PAIRINGS
from nabla_attn.core.order import TokenLayout
from nabla_attn.core.scores import pool_blocks, score_blocks

grids = pytest.mark.parametrize("grid", ODD_GRIDS.values(), ids=ODD_GRIDS.keys())


@pytest.mark.parametrize("name", [name for name in ODD_GRIDS if name != "clips"])
@pytest.mark.parametrize("algorithm", ["nabla-1", "dense", "topk-1"])
@pytest.mark.parametrize("backend", ["auto", "gather"])
def test_keeping_everything_equals_dense_attention(name, algorithm, backend):
    grid = ODD_GRIDS[name]
    q, k, v = random_qkv(grid, batch=3)
    out = na.nabla_attention(q, k, v, grid, na.parse(algorithm), backend=backend)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["exact", "ragged", "clips"])
@pytest.mark.parametrize("block", [(1, 16, 16), (2, 4, 4), (3, 5, 1)])
def test_blocks_of_the_algorithm_are_blocks_of_the_grid(name, block):
    plain, text = ODD_GRIDS[name], 5
    grid = replace(plain, block=na.BlockShape(*block))
    q, k, v = random_qkv(grid, num_text=text)
    algorithm = "nabla-0.5_sta-1-1-3_block-" + "-".join(map(str, block))
    wanted = na.nabla_attention(q, k, v, grid, "nabla-0.5_sta-1-1-3", text_after=text)
    for start in (plain, grid):
        out = na.nabla_attention(q, k, v, start, algorithm, text_after=text)
        assert torch.equal(out, wanted)
        found = na.build_block_map(q, k, start, algorithm, text_after=text)
        assert found.mask.shape[-1] == grid.num_blocks + -(-text // grid.block.tokens)


@pytest.mark.parametrize("name", ["exact", "ragged", "clips"])
@pytest.mark.parametrize("algorithm", ["nabla-0.5_sta-1-3-3", "topk-0.3", "sta-1-3-3", "dense"])
@pytest.mark.parametrize("shape", [(0, 2), (2, 0)], ids=["batch", "heads"])
def test_of_nothing_there_is_an_empty_map_and_output(name, algorithm, shape):
    grid, num_text = ODD_GRIDS[name], 3
    q, k, v = (torch.zeros(*shape, grid.num_tokens + num_text, 16) for _ in range(3))
    q.requires_grad_()
    valid = torch.ones(shape[0], num_text, dtype=torch.bool)
    config = na.parse(algorithm)
    pairings = (None,) if config.is_dense else (None, *PAIRINGS)
    for algorithm in (replace(config, pair_queries=pair) for pair in pairings):
        options = {"text_after": num_text, "text_valid": valid}
        bmap = na.build_block_map(q, k, grid, algorithm, **options)
        assert bmap.mask.shape[:2] == bmap.head_density.shape == shape
        assert math.isnan(bmap.density)
        assert bmap.to_block_mask().to_dense().shape == bmap.mask.shape
        for backend in ("auto", "reference", "gather"):
            out = na.nabla_attention(q, k, v, grid, algorithm, backend=backend, **options)
            assert out.shape == q.shape
            out.sum().backward()


def test_packed_clips_equal_clips_alone():
    grid = ODD_GRIDS["clips"]
    q, k, v = random_qkv(grid)
    config = na.parse("nabla-0.5_sta-1-1-1")
    packed = na.nabla_attention(q, k, v, grid, config)
    start = 0
    for frames in grid.segments:
        stop = start + frames * grid.height * grid.width
        alone = na.TokenGrid(frames, grid.height, grid.width)
        part = na.nabla_attention(*(x[:, :, start:stop] for x in (q, k, v)), alone, config)
        torch.testing.assert_close(packed[:, :, start:stop], part, atol=1e-6, rtol=0)
        start = stop


@given(seed=st.integers(0, 99), name=st.sampled_from(sorted(ODD_GRIDS)))
@settings(max_examples=20, deadline=None)
def test_permuting_heads_permutes_maps_and_outputs(seed, name):
    torch.manual_seed(seed)
    grid = ODD_GRIDS[name]
    q, k, _ = random_qkv(grid, heads=4)
    swap = torch.randperm(4)
    config = na.parse("nabla-0.5")
    bmap = na.build_block_map(q, k, grid, config)
    swapped = na.build_block_map(q[:, swap], k[:, swap], grid, config)
    assert torch.equal(swapped.mask, bmap.mask[:, swap])


@given(low=st.floats(0.05, 1), high=st.floats(0.05, 1), name=st.sampled_from(sorted(ODD_GRIDS)))
@settings(max_examples=30, deadline=None)
def test_density_never_falls_as_the_threshold_rises(low, high, name):
    grid = ODD_GRIDS[name]
    q, k, _ = random_qkv(grid)
    low, high = sorted((low, high))
    fewer, more = (
        na.build_block_map(q, k, grid, na.SparseConfig(threshold=t)) for t in (low, high)
    )
    assert fewer.density <= more.density
    assert fewer.mask.any(-1).all()


@grids
def test_a_window_only_adds(grid):
    q, k, _ = random_qkv(grid)
    alone = na.build_block_map(q, k, grid, na.parse("nabla-0.3"))
    joined = na.build_block_map(q, k, grid, na.parse("nabla-0.3_sta-3-3-3"))
    window = na.build_block_map(q, k, grid, na.parse("sta-3-3-3"))
    assert torch.equal(joined.mask, alone.mask | window.mask)


@grids
def test_padding_is_neither_pooled_nor_attended(grid):
    q, k, v = random_qkv(grid)
    out = na.nabla_attention(q, k, v + 1e4, grid, na.parse("nabla-0.5"))
    assert (out > 9e3).all()


def test_every_sample_has_its_own_map():
    grid = ODD_GRIDS["exact"]
    q, k, v = random_qkv(grid, batch=3)
    config = na.parse("nabla-0.4")
    together = na.nabla_attention(q, k, v, grid, config)
    for sample in range(3):
        part = slice(sample, sample + 1)
        alone = na.nabla_attention(q[part], k[part], v[part], grid, config)
        torch.testing.assert_close(together[part], alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("algorithm", ["nabla-0.5", "topk-0.3"])
def test_what_is_not_a_number_shows_in_the_output(algorithm):
    grid = ODD_GRIDS["exact"]
    q, k, v = random_qkv(grid)
    poisoned = q.clone()
    poisoned[0, 0, 5] = float("nan")
    out = na.nabla_attention(poisoned, k, v, grid, algorithm)
    assert out[0, 0, 5].isnan().all() and not out[0, 1].isnan().any()
    k[0, 0, 7] = float("inf")
    assert na.nabla_attention(q, k, v, grid, algorithm)[0, 0].isnan().any()


@pytest.mark.parametrize("algorithm", ["dense", "nabla-0.5"])
def test_no_samples_and_wrong_grids(algorithm):
    grid = ODD_GRIDS["exact"]
    q, k, v = random_qkv(grid)
    none = [x[:0] for x in (q, k, v)]
    assert na.nabla_attention(*none, grid, algorithm).shape == none[0].shape
    with pytest.raises(ValueError, match="tokens for 9x9x9"):
        na.nabla_attention(q, k, v, na.TokenGrid(9, 9, 9), algorithm)
    with pytest.raises(ValueError, match="is not an algorithm"):
        na.nabla_attention(q, k, v, grid, "fast")


@pytest.mark.parametrize("algorithm", ["dense", "sta-1-1-1", "nabla-0.5"])
def test_maps_of_what_does_not_fit_are_refused(algorithm):
    grid = ODD_GRIDS["exact"]
    q, k, _ = random_qkv(grid, heads=4)
    with pytest.raises(ValueError, match="tokens for 9x9x9"):
        na.build_block_map(q, k, na.TokenGrid(9, 9, 9), algorithm)
    with pytest.raises(ValueError, match="q, k must share one floating dtype"):
        na.build_block_map(q, k.double(), grid, algorithm)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2)])
def test_keys_of_other_heads_are_refused(shape):
    q, k = torch.zeros(1, 4, 64, 8), torch.zeros(*shape, 64, 8)
    with pytest.raises(ValueError, match=r"q, k must share one shape .* got \[\(1, 4, 64, 8\)"):
        backends.check_inputs(q=q, k=k)


def test_first_frame_can_be_kept():
    grid = na.TokenGrid(3, 8, 16)
    q, k, _ = random_qkv(grid)
    bmap = na.build_block_map(q, k, grid, "nabla-0.1_keep-first-frame")
    assert bmap.mask[..., :2].all()
    assert not na.build_block_map(q, k, grid, na.parse("nabla-0.1")).mask[..., :2].all()


@pytest.mark.parametrize("algorithm", ["sta-1-1-1", "nabla-0.2_sta-1-1-1"])
def test_writing_in_a_map_changes_no_other(algorithm):
    grid = na.TokenGrid(2, 16, 16)
    q, k, _ = random_qkv(grid)
    first = na.build_block_map(q, k, grid, algorithm).mask
    before = first.clone()
    first[0, 0, 0] = True
    assert torch.equal(na.build_block_map(q, k, grid, algorithm).mask, before)


def test_scale_reaches_map_and_output():
    grid = ODD_GRIDS["exact"]
    q, k, v = random_qkv(grid)
    config = na.parse("nabla-0.5")
    ours = na.nabla_attention(q, k, v, grid, config, scale=0.5)
    same = na.nabla_attention(2 * q, k, v, grid, config, scale=0.25)
    torch.testing.assert_close(ours, same, atol=1e-6, rtol=0)
    assert not torch.allclose(ours, na.nabla_attention(q, k, v, grid, config), atol=1e-3)


def test_the_map_is_data():
    grid = ODD_GRIDS["exact"]
    q, k, v = (x.requires_grad_() for x in random_qkv(grid))
    assert not na.build_block_map(q, k, grid, na.parse("nabla-0.5")).mask.requires_grad
    na.nabla_attention(q, k, v, grid, na.parse("nabla-0.5")).sum().backward()
    assert q.grad.abs().sum() > 0 and k.grad.abs().sum() > 0


def test_text_before_and_after_differ_only_in_place():
    grid = ODD_GRIDS["ragged"]
    q, k, v = random_qkv(grid, num_text=7)
    config = na.parse("nabla-0.5")
    after = na.nabla_attention(q, k, v, grid, config, text_after=7)
    moved = (torch.cat([x[:, :, -7:], x[:, :, :-7]], 2) for x in (q, k, v))
    before = na.nabla_attention(*moved, grid, config, text_before=7)
    torch.testing.assert_close(before[:, :, 7:], after[:, :, :-7], atol=1e-6, rtol=0)


def test_import_loads_torch_and_nothing_heavier():
    code = (
        "import sys, nabla_attn; heavy = {'diffusers', 'transformers', 'matplotlib', 'av', 'scipy',"
        " 'accelerate', 'fastapi'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("algorithm", ["nabla-0.4", "topk-0.3", "nabla-0.4_sta-1-3-3", "topk-0.2"])
@grids
def test_panels_of_any_size_give_the_same_map(grid, algorithm, monkeypatch):
    q, k, _ = random_qkv(grid, batch=2, heads=3)
    whole = na.build_block_map(q, k, grid, na.parse(algorithm))
    for scores in (1, 3 * grid.num_blocks, 2 * grid.num_blocks**2):
        monkeypatch.setattr(block_selection, "PANEL_SCORES", scores)
        assert torch.equal(na.build_block_map(q, k, grid, na.parse(algorithm)).mask, whole.mask)


COMPILED_MAP = """
import torch
import nabla_attn as na
from nabla_attn import fusion
from tests.oracle import random_qkv

q, k, _ = random_qkv(na.TokenGrid(3, 17, 16), batch=2)
build = lambda text: na.build_block_map(q, k, na.TokenGrid(3, 17, 16), na.parse(text)).mask
eager = {text: build(text) for text in ("nabla-0.4", "nabla-0.8")}
fusion.MIN_ELEMENTS = 0
assert torch.equal(build("nabla-0.4"), eager["nabla-0.4"])
with torch._dynamo.config.patch(error_on_recompile=True):
    assert torch.equal(build("nabla-0.8"), eager["nabla-0.8"])
"""


def test_a_compiled_map_is_the_same_and_a_new_threshold_recompiles_nothing():
    # A process of its own: the compiler cannot see through this run's type checks.
    subprocess.run([sys.executable, "-c", COMPILED_MAP], check=True, cwd=Path(__file__).parents[1])


def test_kept_mass_is_measured_on_the_map_that_is_used():
    grid = na.TokenGrid(2, 16, 16)
    q, k, _ = random_qkv(grid)
    layout = TokenLayout(grid)
    blocks = [na.to_blocks(x, grid) for x in (q, k)]
    for algorithm, low in (("nabla-0.6", 0.6), ("dense", 1), ("sta-1-1-1", 0), ("topk-0.5", 0)):
        bmap = block_selection.select_blocks(*blocks, layout, na.parse(algorithm), measure=True)
        pooled = [pool_blocks(x, torch.full((8,), 64)) for x in blocks]
        probs = score_blocks(*pooled)
        expected = (probs * bmap.mask).sum(-1).mean(-1)
        torch.testing.assert_close(bmap.kept_mass, expected)
        assert (bmap.kept_mass >= low - 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("algorithm", ["nabla-0.5", "dense"])
def test_autocast_acts_as_on_scaled_dot_product_attention(algorithm, dtype):
    # Normalised q and k often come in fp32 beside v in half precision.
    grid = ODD_GRIDS["ragged"]
    q, k, v = random_qkv(grid)
    v = v.to(dtype)
    with pytest.raises((ValueError, RuntimeError), match="dtype"):
        na.nabla_attention(q, k, v, grid, algorithm)
    with torch.autocast("cpu", dtype=dtype):
        out = na.nabla_attention(q, k, v, grid, algorithm)
        assert out.dtype == F.scaled_dot_product_attention(q, k, v).dtype == dtype
        # A rounded map is a different result.
        used = na.build_block_map(q, k, grid, algorithm).mask
    assert torch.equal(used, na.build_block_map(q, k, grid, algorithm).mask)
    exact = na.nabla_attention(q, k, v.float(), grid, algorithm)
    torch.testing.assert_close(out.float(), exact, atol=0.1, rtol=0.1)
    with torch.autocast("cpu", dtype=dtype):
        assert na.nabla_attention(*(x.double() for x in (q, k, v)), grid, algorithm).dtype == (
            torch.float64
        )


@pytest.mark.parametrize("backend", ["auto", "reference", "gather"])
@pytest.mark.parametrize("num_valid", [0, 3])
def test_dense_behind_padded_text_is_dense_on_every_backend(backend, num_valid):
    grid, num_text = ODD_GRIDS["ragged"], 7
    q, k, v = random_qkv(grid, batch=2, num_text=num_text)
    valid = torch.ones(2, num_text, dtype=torch.bool)
    valid[1, num_valid:] = False
    options = {"text_after": num_text, "text_valid": valid, "backend": backend}
    out = na.nabla_attention(q, k, v, grid, "dense", **options)
    mask = torch.cat([valid.new_ones(2, grid.num_tokens), valid], dim=1)[:, None, None]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("algorithm", ["nabla-0.5", "dense"])
def test_dtypes_that_differ_work_or_raise_as_in_pytorchs_attention(autocast, algorithm):
    def outcome(attend, *args):
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            try:
                return attend(*args).dtype
            except (RuntimeError, ValueError):
                return "raises"

    x = torch.randn(1, 1, 128, 8, generator=torch.Generator().manual_seed(0))
    grid = na.TokenGrid(2, 8, 8)
    for dtypes in itertools.product(DTYPES, repeat=3):
        qkv = [x.to(dtype) for dtype in dtypes]
        expected = outcome(torch.nn.functional.scaled_dot_product_attention, *qkv)
        assert outcome(na.nabla_attention, *qkv, grid, algorithm) == expected, dtypes
