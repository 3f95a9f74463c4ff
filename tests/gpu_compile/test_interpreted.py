"""The kernels that Inductor wrote for CUDA, run by Triton's interpreter, equal float64."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CASE = {"grids": [[1, 9, 12]], "heads": 1, "dim": 16, "batch": 2, "num_text": 5}


@pytest.fixture(scope="module")
def errors(lab):
    """The largest errors of a case's kernels in the interpreter."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.gpu_compile.interpret"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as process:

        def run(**case):
            case = CASE | {"needs_backward": False} | case
            codes = lab.attention("sm_90", most=0, **case)["codes"]
            process.stdin.write(json.dumps({"codes": codes, "case": case}) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            assert answer, "the interpreter ended"
            return json.loads(answer)

        yield run
        process.stdin.close()


def test_the_forward_equals_float64(errors):
    # A ragged grid, padded text, two samples; NaN wherever a kernel does not write.
    found = errors(dtype="float32")
    assert found.keys() == {"out"} and found["out"] < 1e-5


def test_backwards_and_tiles_that_reach_beyond_the_last_block_equal_float64(errors):
    # Five blocks in tiles of two. The interpreter has no products in bfloat16.
    options = {"tile_rows": 2}
    found = errors(dtype="float16", needs_backward=True, options=options)
    assert found.keys() == {"out", "DQ", "DK", "DV"}
    assert max(found.values()) < 0.01, found


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2])
def test_float32_equals_float64_to_rounding(errors, rows):
    options = {"tile_rows": rows}
    found = errors(dtype="float32", needs_backward=True, options=options)
    assert max(found.values()) < 1e-4, found
