"""Every map that the reference recorded, bit for bit, and its outputs."""

from pathlib import Path

import pytest
import torch

import nabla_attn as na

FILES = ["mask_t2h3w2_d128", "mask_t3h2w2_d64", "mask_t5h3w4_d32", "mask_t6h4w5_d32"]


def read_qkv(z, grid, names=("q_int8", "k_int8", "v_int8"), scale=0.125):
    return tuple(na.to_raster(torch.from_numpy(z[name]).float() * scale, grid) for name in names)


def combinations(z):
    for index, (threshold, window) in enumerate(zip(z["thr"], z["sta"], strict=True)):
        sides = tuple(int(side) for side in window) if window.any() else None
        yield index, na.SparseConfig(threshold=float(threshold), window=sides)


@pytest.mark.parametrize("name", FILES)
def test_maps_are_exact_and_outputs_close(name, golden):
    z = golden(f"{name}.npz")
    frames, rows, columns = (int(count) for count in z["grid"])
    grid = na.TokenGrid(frames, 8 * rows, 8 * columns)
    q, k, v = read_qkv(z, grid)
    tokens = torch.from_numpy(z["rows"]).long()
    for index, config in combinations(z):
        bmap = na.build_block_map(q, k, grid, config)
        assert torch.equal(bmap.mask, torch.from_numpy(z["mask"][index])), config
        counts = torch.from_numpy(z["kv_num_blocks"][index])
        assert torch.equal(bmap.mask.sum(-1, dtype=torch.int32), counts)
        out = na.to_blocks(na.nabla_attention(q, k, v, grid, config), grid)[:, :, tokens]
        expected = torch.from_numpy(z["out_rows"][index])
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


def test_whole_output_of_one_combination(golden):
    z = golden("mask_t3h2w2_d64.npz")
    grid = na.TokenGrid(3, 16, 16)
    q, k, v = read_qkv(z, grid)
    _, config = list(combinations(z))[int(z["out_full_combo"])]
    for backend in ("reference", "gather"):
        out = na.to_blocks(na.nabla_attention(q, k, v, grid, config, backend=backend), grid)
        torch.testing.assert_close(out, torch.from_numpy(z["out_full"]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("document", ["doc0", "doc1"])
def test_packed_clips(document, golden):
    z = golden("mask_edge.npz")
    frames, rows, columns = (int(count) for count in z[f"{document}_grid"])
    bounds = z[f"{document}_seq"]
    segments = tuple(int(length) for length in bounds[1:] - bounds[:-1])
    grid = na.TokenGrid(frames, 8 * rows, 8 * columns, segments=segments)
    q, k = read_qkv(z, grid, (f"{document}_q_int8", f"{document}_k_int8"))
    for window, key in ((None, "mask"), ((3, 3, 3), "mask_sta-3-3-3")):
        for threshold, mask in zip(z[f"{document}_thr"], z[f"{document}_{key}"], strict=True):
            config = na.SparseConfig(threshold=float(threshold), window=window)
            bmap = na.build_block_map(q, k, grid, config)
            assert torch.equal(bmap.mask, torch.from_numpy(mask)), (threshold, window)


def test_uniform_rows_keep_the_defined_number_of_blocks(golden):
    z = golden("mask_edge.npz")
    frames, rows, columns = (int(count) for count in z["uniform_grid"])
    grid = na.TokenGrid(frames, 8 * rows, 8 * columns)
    q = torch.zeros(1, 1, grid.num_tokens, 8)
    for threshold, kept in zip(z["uniform_thr"], z["uniform_kept_per_row"], strict=True):
        bmap = na.build_block_map(q, q, grid, na.SparseConfig(threshold=float(threshold)))
        assert (bmap.mask.sum(-1) == int(kept)).all()
        assert bmap.mask[..., : int(kept)].all()


def test_peaked_rows_find_their_block(golden):
    z = golden("mask_edge.npz")
    permutation = torch.from_numpy(z["peaked_perm"]).long()
    num_blocks = permutation.numel()
    grid = na.TokenGrid(num_blocks, 8, 8)
    codes = 16 * torch.eye(num_blocks, 64)
    k = codes.repeat_interleave(64, 0)[None, None]
    q = codes[permutation].repeat_interleave(64, 0)[None, None]
    for threshold, mask in zip(z["peaked_thr"], z["peaked_mask"], strict=True):
        bmap = na.build_block_map(q, k, grid, na.SparseConfig(threshold=float(threshold)))
        assert torch.equal(bmap.mask, torch.from_numpy(mask)), threshold


def test_every_recorded_map_file_is_visited():
    files = {path.stem for path in (Path(__file__).parent / "golden").glob("mask_*.npz")}
    assert files == {*FILES, "mask_edge"}
