"""What is compiled again and what is not: counted in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PRELUDE = """
import json
import torch
from torch._dynamo.utils import counters
import nabla_attn as na
from nabla_attn import fusion
from nabla_attn.backends import flex

fusion.MIN_ELEMENTS = 0
A, B, C = na.TokenGrid(3, 17, 16), na.TokenGrid(4, 16, 24), na.TokenGrid(5, 11, 40)
counts = []

def tell():
    # And forget what was compiled.
    print(json.dumps(counts))
    counts.clear()
    torch._dynamo.reset()
    fusion.compiled.cache_clear()

def count(run):
    before = counters["stats"]["unique_graphs"]
    run()
    counts.append(counters["stats"]["unique_graphs"] - before)

def qkv(grid, heads=3, batch=1, dtype=torch.float32):
    return torch.randn(3, batch, heads, grid.num_tokens, 16).to(dtype)

def build(algorithm, grid, **sizes):
    q, k, _ = qkv(grid, **sizes)
    return na.build_block_map(q, k, grid, na.parse(algorithm))
"""
# Guards are the tracer's, so counting needs no generated code.
NO_CODE = """
fusion.why_not_compile = lambda device: None
compile_ = torch.compile
torch.compile = lambda function, **options: compile_(function, backend="eager", **options)
"""
MAPS = """
for algorithm, grid, sizes in (
    ("nabla-0.4", A, {}),
    ("nabla-0.4", A, {}),
    ("nabla-0.8", A, {}),
    ("nabla-0.4", A, {"batch": 2}),
    ("nabla-0.4", A, {"dtype": torch.bfloat16}),
    ("nabla-0.4", B, {}),
    ("nabla-0.4", C, {"batch": 3}),
    ("nabla-0.4_sta-1-3-3", A, {}),
    ("nabla-0.5_sta-3-3-3", A, {"batch": 2}),
    ("nabla-0.5_sta-3-3-3", B, {}),
    ("nabla-0.6_sta-1-1-1", C, {}),
):
    count(lambda: build(algorithm, grid, **sizes))
tell()
"""
PANELS = """
from nabla_attn import block_selection
block_selection.PANEL_SCORES = 2 * A.num_blocks**2
for heads in (5, 7, 9):
    count(lambda: build("nabla-0.4", A, heads=heads))
tell()
"""
FLEX = """
for algorithm, grid, sizes in (
    ("nabla-0.4", A, {}),
    ("nabla-0.4", A, {}),
    ("nabla-0.9", A, {}),
    ("nabla-0.9_sta-1-1-1", A, {}),
    ("topk-0.3", A, {}),
    ("nabla-0.4", B, {}),
    ("nabla-0.4", C, {}),
    ("nabla-0.4", A, {"dtype": torch.bfloat16}),
    ("nabla-0.6", B, {"dtype": torch.bfloat16}),
):
    block_map = build(algorithm, grid, **sizes)
    blocks = [na.to_blocks(x, grid) for x in qkv(grid, **sizes)]
    count(lambda: flex.attend(*blocks, block_map))
tell()
"""
CACHE = """
build("nabla-0.4", A)
found = counters["inductor"]
print(json.dumps([found["fxgraph_cache_hit"], found["fxgraph_cache_miss"]]))
"""


def run(*parts, **environment):
    process = subprocess.run(
        [sys.executable, "-c", "".join(parts)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
    )
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines()]


@pytest.fixture(scope="module")
def counts():
    """Graphs that each call compiled: of maps, of attention, and of maps in panels."""
    return run(PRELUDE, NO_CODE, MAPS, FLEX, PANELS)


def test_maps_compile_once_then_once_for_all_other_grids_and_so_with_a_window(counts):
    # Pooling and selection; then a dtype's pooling, pooling of a grid without ragged edges and
    # selection for all sizes, and selection with a window, for one size and for all.
    assert counts[0] == [2, 0, 0, 0, 1, 2, 0, 1, 0, 1, 0]


def test_panels_of_many_heads_are_one_shape(counts):
    assert counts[2] == [2, 0, 0]


def test_flex_compiles_once_per_dtype_and_once_more_for_all_other_sizes(counts):
    assert counts[1] == [1, 0, 0, 0, 0, 1, 0, 1, 0]


@pytest.mark.slow
def test_a_second_process_starts_from_the_compile_cache(tmp_path):
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    assert run(PRELUDE, CACHE, **cache) == [[0, 1]]
    assert run(PRELUDE, CACHE, **cache) == [[1, 0]]
