"""Scratch memory of the map: bounded, whatever the number of heads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.wan.live_memory import measure_peak

import nabla_attn as na
from nabla_attn import block_selection
from nabla_attn.core import block_map
from nabla_attn.core.order import TokenLayout

GRID = na.TokenGrid(6, 17, 40)
DIM, TEXT = 16, 70


@pytest.fixture
def small_panels(monkeypatch):
    monkeypatch.setattr(block_selection, "PANEL_SCORES", 2**13)
    monkeypatch.setattr(block_selection, "PANEL_TOKENS", 2**15)
    monkeypatch.setattr(block_map, "PANEL_PAIRS", 2**13)


def scratch(heads, num_text=0):
    """Bytes alive at the peak beside the map and the pooled tokens, which have to grow."""
    layout = TokenLayout(GRID, 0, num_text)
    tokens = torch.randn(1, 1, layout.num_tokens, DIM).expand(1, heads, -1, -1)
    options = {"text_after": num_text} if num_text else {}

    def build():
        bmap = na.build_block_map(tokens, tokens, GRID, na.parse("nabla-0.6_sta-3-3-3"), **options)
        return bmap, bmap.head_density

    build()  # tables and windows are cached
    pooled = 2 * heads * GRID.num_blocks * DIM * 4
    return measure_peak(build) - heads * layout.num_blocks**2 - pooled


@pytest.mark.parametrize("num_text", [0, TEXT])
def test_scratch_does_not_grow_with_heads(small_panels, num_text):
    few, many = scratch(2, num_text), scratch(32, num_text)
    # What may grow is a number per row.
    assert many < few + 32 * GRID.num_blocks * 64
    assert many < 0.6 * 32 * GRID.num_blocks**2 * 4


@pytest.mark.parametrize("heads", [1, 3, 7])
@pytest.mark.parametrize("algorithm", ["nabla-0.6_sta-1-3-3", "topk-0.2", "sta-3-3-3", "nabla-1"])
def test_panels_do_not_change_the_map(monkeypatch, heads, algorithm):
    q, k = torch.randn(2, 2, heads, GRID.num_tokens + TEXT, DIM)
    config = na.parse(algorithm)
    whole = na.build_block_map(q, k, GRID, config, text_after=TEXT)
    for scores, tokens in ((2**13, 2**15), (2**15, 2**40), (50, 1)):
        monkeypatch.setattr(block_selection, "PANEL_SCORES", scores)
        monkeypatch.setattr(block_selection, "PANEL_TOKENS", tokens)
        monkeypatch.setattr(block_map, "PANEL_PAIRS", scores)
        panels = na.build_block_map(q, k, GRID, config, text_after=TEXT)
        assert torch.equal(panels.mask, whole.mask)
        assert torch.equal(panels.head_density, whole.head_density)


@pytest.mark.parametrize(("total", "most"), [(1, 5), (7, 3), (12, 5), (40, 21), (5, 0), (4, 4)])
def test_slices_have_one_length_and_cover_all(total, most):
    slices = list(block_selection._equal_slices(total, most))
    assert len({part.stop - part.start for part in slices}) == 1
    assert {i for part in slices for i in range(part.start, part.stop)} == set(range(total))
    assert slices[0].stop - slices[0].start <= max(1, most)


LONG = """
import json, resource, sys
import torch
import nabla_attn as na

heads, config = int(sys.argv[1]), na.parse("nabla-0.6_sta-3-3-3")

def build(grid, heads):
    tokens = torch.randn(1, 1, grid.num_tokens, 128).to(torch.bfloat16)
    tokens = tokens + torch.linspace(0, 3, grid.num_tokens)[:, None].cos().to(torch.bfloat16)
    tokens = tokens.expand(1, heads, -1, -1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bmap = na.build_block_map(tokens, tokens, grid, config)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (after - before) * 1024 - bmap.mask.numel()

build(na.TokenGrid(16, 64, 64), 2)  # the compiler's own memory is no scratch
print(json.dumps(build(na.TokenGrid(80, 64, 64), heads)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("heads", [10, 40])
def test_a_map_of_327680_tokens_needs_less_than_2_gb_beside_itself(heads):
    process = subprocess.run(
        [sys.executable, "-c", LONG, str(heads)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert json.loads(process.stdout) < 2e9
