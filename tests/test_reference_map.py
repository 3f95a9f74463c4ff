"""The fast path against the plain definition of a map, over grids, rules and recordings."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.oracle import ODD_GRIDS, random_qkv
from tests.test_golden_maps import FILES, combinations, read_qkv

import nabla_attn as na
from nabla_attn.core.order import TokenLayout
from nabla_attn.reference_map import keep_by_mass, reference_map

ALGORITHMS = (
    "dense",
    "nabla-0.5",
    "nabla-1",
    "topk-0.3",
    "sta-1-3-3",
    "nabla-0.4_sta-3-1-1",
    "topk-0.2_sta-1-1-3_keep-first-frame",
    "nabla-0.3_keep-first-frame",
    "nabla-0.4_pair-union",
    "nabla-0.4_pair-pool",
    "sta-1-3-1_pair-union",
    "nabla-0.3_block-2-4-4",
)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", ODD_GRIDS)
def test_the_fast_path_is_the_definition(name, algorithm):
    config, num_text = na.parse(algorithm), 5
    q, k, _ = random_qkv(ODD_GRIDS[name], batch=3, num_text=num_text, dtype=torch.float64)
    layout = TokenLayout(ODD_GRIDS[name].with_block(config.block, config.order), 0, num_text)
    fast = na.build_block_map(q, k, ODD_GRIDS[name], config, text_after=num_text).mask
    count = layout.grid.num_blocks
    assert torch.equal(fast[:, :, :count, :count], reference_map(q, k, layout, config))
    assert fast[:, :, count:].all() and fast[..., count:].all()


@given(seed=st.integers(0, 999), threshold=st.floats(0.01, 0.999), share=st.floats(0.01, 1))
def test_any_threshold_and_share(seed, threshold, share):
    torch.manual_seed(seed)
    grid = ODD_GRIDS["ragged"]
    q, k, _ = random_qkv(grid, dtype=torch.float64)
    for config in (na.SparseConfig(threshold=threshold), na.SparseConfig(topk=share)):
        expected = reference_map(q, k, TokenLayout(grid), config, scale=0.7)
        assert torch.equal(na.build_block_map(q, k, grid, config, scale=0.7).mask, expected)


@pytest.mark.parametrize("name", FILES)
def test_the_definition_is_what_the_authors_recorded(name, golden):
    z = golden(f"{name}.npz")
    frames, rows, columns = (int(count) for count in z["grid"])
    grid = na.TokenGrid(frames, 8 * rows, 8 * columns)
    q, k, _ = read_qkv(z, grid)
    for index, config in combinations(z):
        found = reference_map(q, k, TokenLayout(grid), config)
        assert torch.equal(found, torch.from_numpy(z["mask"][index])), config


def test_ties_go_to_the_lower_index_and_the_crossing_block_is_kept():
    rows = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.1, 0.5, 0.1, 0.3]])
    assert keep_by_mass(rows, 0.5).int().tolist() == [[1, 1, 0, 0], [0, 1, 0, 0]]
    assert keep_by_mass(rows, 0.51).int().tolist() == [[1, 1, 1, 0], [0, 1, 0, 1]]
