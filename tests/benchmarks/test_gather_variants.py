"""Other ways to gather: each is right, and what rows of a map share is counted."""

from dataclasses import replace
from unittest import mock

import pytest
import torch

import nabla_attn as na
from benchmarks import gather_variants
from nabla_attn.backends import gather
from nabla_attn.bench.workloads import WORKLOADS, workload
from nabla_attn.record import RunRecord

GRID = na.TokenGrid(2, 16, 24)


@pytest.mark.parametrize("attend", gather_variants.WAYS.values(), ids=gather_variants.WAYS)
def test_each_way_equals_ours(attend, monkeypatch):
    # Several rows to a product, and several products.
    monkeypatch.setattr(gather, "CPU_BYTES_PER_THREAD", 12 * 4 * 64**2)
    q, k, v = torch.randn(3, 2, 3, GRID.num_tokens, 16)
    expected = na.nabla_attention(q, k, v, GRID, "nabla-0.6", backend="gather")
    with mock.patch.object(gather, "attend", attend):
        out = na.nabla_attention(q, k, v, GRID, "nabla-0.6", backend="gather")
    torch.testing.assert_close(out, expected)


def test_runs_end_where_numbers_do_not_follow():
    assert list(gather_variants._runs([3, 4, 5, 7, 9, 10])) == [(0, 3), (3, 4), (4, 6)]


def test_what_rows_share_is_counted():
    q, k, _ = torch.randn(3, 1, 1, GRID.num_tokens, 16)
    bmap = na.build_block_map(q, k, GRID, "nabla-0.6")
    rows = [[1, 1, 0, 1], [1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 1, 1]]
    shared = gather_variants.count_sharing(replace(bmap, mask=torch.tensor([[rows]]).bool()))
    # The pairs keep 6 and 3 blocks, their unions 3 and 3; there are 6 runs.
    assert shared == {"equal_pairs": 0.5, "products_of_unions": 12 / 9, "blocks_a_run": 9 / 6}


def test_all_are_checked_and_timed_in_one_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nabla_attn.backends.flex.why_not_compile", lambda device: "not in tests")
    small = replace(workload("toy-16k"), grid=GRID, heads=1, dim=32)
    monkeypatch.setitem(WORKLOADS, "toy-16k", small)
    path = tmp_path / "variants.json"
    gather_variants.main(["--density", "0.5", "--rounds", "1", "--output", str(path)])
    forward, both, *_ = RunRecord.load(path).numbers["results"]
    names = {f"ours (gather, {name})" for name in gather_variants.WAYS}
    assert all(forward["contenders"][name]["gate"]["passed"] for name in names)
    assert all("no backward" in both["contenders"][name]["why_not"] for name in names)
    assert forward["shared"]["products_of_unions"] > 1
    assert "ours (gather, buckets of twice the size)" in capsys.readouterr().out
