"""The kernels that Inductor wrote for CUDA, run by Triton's interpreter, equal float64."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CASE = {"grids": [[1, 9, 12]], "heads": 1, "dim": 16, "batch": 2, "num_text": 5}


def errors(lab, **case):
    case = CASE | {"needs_backward": False} | case
    codes = lab.attention("sm_90", most=0, **case)["codes"]
    process = subprocess.run(
        [sys.executable, "-m", "tests.gpu_compile.interpret"],
        input=json.dumps({"codes": codes, "case": case}),
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_the_forward_equals_float64(lab):
    # A ragged grid, padded text, two samples; NaN wherever a kernel does not write.
    found = errors(lab, dtype="float32")
    assert found.keys() == {"out"} and found["out"] < 1e-5


def test_backwards_and_tiles_that_reach_beyond_the_last_block_equal_float64(lab):
    # Five blocks in tiles of two. The interpreter has no products in bfloat16.
    options = {"tile_rows": 2}
    found = errors(lab, dtype="float16", needs_backward=True, options=options)
    assert found.keys() == {"out", "DQ", "DK", "DV"}
    assert max(found.values()) < 0.01, found


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2])
def test_float32_equals_float64_to_rounding(lab, rows):
    options = {"tile_rows": rows}
    found = errors(lab, dtype="float32", needs_backward=True, options=options)
    assert max(found.values()) < 1e-4, found
