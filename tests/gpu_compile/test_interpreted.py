"""The kernels that Inductor wrote for CUDA, run by Triton's interpreter, equal float64."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CASE = {"grids": [[1, 9, 12]], "heads": 1, "dim": 16, "batch": 2, "num_text": 5}
CASE |= {"algorithm": "nabla-0.4", "needs_backward": False}


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
            case = CASE | case
            codes = lab.attention("sm_90", compiles=False, **case)["codes"]
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


@pytest.mark.parametrize(
    ("dtype", "most"), [("float16", 0.01), pytest.param("float32", 1e-4, marks=pytest.mark.slow)]
)
def test_summaries_and_their_gradients_equal_float64(errors, dtype, most):
    found = errors(dtype=dtype, needs_backward=True, algorithm="nabla-0.4_tail-mean")
    assert found.keys() == {"out", "DQ", "DK", "DV"}
    assert max(found.values()) < most, found


def test_the_first_order_equals_float64(errors):
    # Two kernels: the difference of their log-sum-exps is the probability of the summaries.
    assert errors(dtype="float32", algorithm="nabla-0.4_tail-first")["out"] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2])
def test_float32_equals_float64_to_rounding(errors, rows):
    options = {"tile_rows": rows}
    found = errors(dtype="float32", needs_backward=True, options=options)
    assert max(found.values()) < 1e-4, found
