"""FlexAttention's kernels as the package asks for them, compiled for five architectures."""

import re
from itertools import product

import pytest

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
LARGE, RAGGED, SMALL = (21, 45, 80), (3, 20, 24), (3, 16, 24)


def kernels_of(answer, direction="flex_attention"):
    # What scales the gradient of a log-sum-exp is named behind the kernel.
    name = re.compile(rf"triton_tem_fused_{direction}(_mul)?_\d+")
    return [kernel for kernel in answer["kernels"] if name.fullmatch(kernel["name"])]


def kernel_of(answer, direction="flex_attention"):
    return kernels_of(answer, direction)[0]


def check(kernel, most_stack=0, has_tensor_cores=True):
    assert kernel["shared"] <= kernel["has_shared"], kernel
    assert kernel["stack"] <= most_stack, kernel
    assert (kernel["tensor_core"] > 0) == has_tensor_cores, kernel
    return kernel


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_forward_fits_with_a_warp_for_16_rows(lab, architecture):
    answer = lab.attention(architecture, grids=[RAGGED])
    kernel = check(kernel_of(answer))
    assert kernel["warps"] == 4 and answer["candidates"]["flex_attention"] == 1
    if architecture == "sm_90":
        # Eight warps would halve the width of the products: 40 instructions.
        assert kernel["tensor_core"] <= 24


@pytest.mark.parametrize(
    ("architecture", "case", "most_stack"),
    [
        ("sm_90", {"options": {"tile_rows": 2}}, 64),
        ("sm_89", {"options": {"tile_rows": 2}}, 128),
        ("sm_90", {"block": [2, 8, 8], "dtype": "float16"}, 0),
        ("sm_90", {"batch": 2, "num_text": 9, "dim": 96}, 0),
        ("sm_120", {"dim": 64}, 0),
        ("sm_80", {"block": [1, 6, 8]}, 0),
        ("sm_89", {"dim": 96, "options": {"tile_rows": 2}}, 128),
        ("sm_90", {"options": {"tile_rows": 1, "kernel": {"fwd_USE_TMA": True}}}, 0),
    ],
    ids=[
        "two-blocks",
        "two-blocks-ada",
        "128-token",
        "padded-text-96",
        "64",
        "48-token",
        "two-blocks-96",
        "tma",
    ],
)
def test_other_forwards_fit(lab, architecture, case, most_stack):
    check(kernel_of(lab.attention(architecture, grids=[SMALL], **case)), most_stack)


@pytest.mark.parametrize(("architecture", "dim"), [("sm_80", 128), ("sm_89", 64)])
def test_float32_stays_in_registers(lab, architecture, dim):
    # Tiles of 64x64 spill 13 KB a thread on sm_80 and do not fit, and 0.7 KB on sm_89.
    answer = lab.attention(architecture, grids=[SMALL], dim=dim, dtype="float32")
    check(kernel_of(answer), has_tensor_cores=False)


def test_a_second_size_of_video_has_the_same_kernel(lab):
    answer = lab.attention("sm_90", grids=[SMALL, (5, 24, 40)])
    forward = [k for k in answer["kernels"] if "flex_attention" in k["name"]]
    assert forward and all(k["is_divisible"] and k["registers"] <= 168 for k in forward)
    registers = [k["registers"] for k in forward]
    assert max(registers) - min(registers) <= 8


def test_a_single_block_is_no_case_for_the_decoding_kernel(lab):
    answer = lab.attention("sm_90", grids=[(1, 8, 8)])
    assert check(kernel_of(answer))["warps"] == 4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_backward_has_kernels_and_fits(lab, architecture):
    answer = lab.attention(architecture, grids=[RAGGED], needs_backward=True)
    is_tuned = architecture in ("sm_90", "sm_100")
    assert answer["candidates"]["flex_attention_backward"] == (12 if is_tuned else 1)
    # torch lists our forward for each of its own tiles, and compiles equal ones once.
    assert answer["candidates"]["flex_attention"] == (7 if is_tuned else 1)
    assert answer["distinct"]["flex_attention"] == (3 if is_tuned else 1)
    check(kernel_of(answer))
    check(kernel_of(answer, "flex_attention_backward"), most_stack=512)


@pytest.mark.parametrize(
    ("architecture", "case"),
    [
        ("sm_80", {"options": {"tile_rows": 2}}),
        ("sm_90", {"block": [2, 8, 8], "dtype": "float16"}),
        ("sm_120", {"grids": [RAGGED], "batch": 2, "num_text": 9, "dim": 96}),
        ("sm_89", {"grids": [SMALL, (5, 24, 40)], "dim": 64}),
    ],
    ids=["two-blocks", "128-token", "padded-text-96", "second-size-64"],
)
def test_other_backwards_fit(lab, architecture, case):
    answer = lab.attention(architecture, needs_backward=True, **{"grids": [SMALL], **case})
    assert all(answer["candidates"].values())
    for kernel in kernels_of(answer):
        check(kernel, most_stack=256)
    for kernel in kernels_of(answer, "flex_attention_backward"):
        check(kernel, most_stack=512)


@pytest.mark.parametrize("tail", ["mean", "first"])
@pytest.mark.parametrize("needs_backward", [False, True], ids=["forward", "backward"])
def test_summaries_of_dropped_blocks_have_kernels_and_fit(lab, needs_backward, tail):
    case = {"algorithm": f"nabla-0.7_tail-{tail}", "batch": 2, "num_text": 100}
    answer = lab.attention("sm_90", grids=[SMALL], needs_backward=needs_backward, **case)
    # The bias and the mask of summaries cost registers; without a tail the forward spills nothing.
    forward = kernels_of(answer)
    backward = kernels_of(answer, "flex_attention_backward")
    # The first order has a second call, for the probability of the summaries.
    assert len(forward) == (2 if tail == "first" else 1)
    assert len(backward) == (len(forward) if needs_backward else 0)
    for kernel in forward:
        check(kernel, most_stack=256)
    for kernel in backward:
        check(kernel)


def test_a_backward_in_float32_takes_blocks_of_48(lab):
    case = {"grids": [SMALL], "block": [1, 6, 8], "dim": 64, "dtype": "float32"}
    answer = lab.attention("sm_90", needs_backward=True, **case)
    check(kernel_of(answer, "flex_attention_backward"), 512, has_tensor_cores=False)


def test_flash_would_see_a_mask_even_where_nothing_is_ragged(lab):
    # torch 2.13 lets FLASH ignore the block map behind a mask that is always true.
    answer = lab.attention("sm_90", grids=[SMALL], block=[2, 8, 8], compiles=False)
    assert answer["trivial_masks"] == [False]


@pytest.mark.parametrize(
    "architecture",
    [
        "sm_90",
        "sm_120",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("sm_80", "sm_89", "sm_100")),
    ],
)
def test_pooling_selection_and_tables_compile(lab, architecture):
    answer = lab.attention(architecture, grids=[LARGE], only_templates=False)
    others = [kernel for kernel in answer["kernels"] if not kernel["is_template"]]
    assert {"cumsum", "softmax"} <= {word for k in others for word in k["name"].split("_")}
    for kernel in others:
        assert kernel["stack"] == 0 and kernel["shared"] <= kernel["has_shared"], kernel
    # Tables are one kernel, which reads the map and writes an index.
    (tables,) = (code for code in answer["codes"] if "cumsum" in code and "index_put" in code)
    assert len(re.findall(r"\.run\(", tables)) == 1


TILES = {
    f"{dim}-dims-{64 * frames}-tokens-{rows}-rows": {
        "dim": dim,
        "block": [frames, 8, 8],
        "options": {"tile_rows": rows} if rows > 1 else None,
    }
    for dim, frames, rows in product((64, 96, 128), (1, 2), (1, 2))
}
CALLS = {
    "ragged-padded-text": {"grids": [RAGGED], "batch": 2, "num_text": 9},
    "second-size": {"grids": [SMALL, (5, 24, 40)]},
    "tail-mean": {"algorithm": "nabla-0.7_tail-mean", "batch": 2, "num_text": 100},
    "tail-first": {"algorithm": "nabla-0.7_tail-first", "batch": 2, "num_text": 100},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", [*TILES.values(), *CALLS.values()], ids=[*TILES, *CALLS])
@pytest.mark.parametrize("needs_backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_everything_fits_everywhere(lab, architecture, dtype, needs_backward, case):
    case = {"grids": [SMALL], "dtype": dtype, "needs_backward": needs_backward, **case}
    answer = lab.attention(architecture, **case)
    assert all(answer["candidates"].values())
    forward, backward = kernels_of(answer), kernels_of(answer, "flex_attention_backward")
    assert forward and len(backward) == needs_backward * len(forward)
    is_half = dtype != "float32"
    for kernel in forward:
        check(kernel, 512 if is_half else 1024, has_tensor_cores=is_half)
    for kernel in backward:
        check(kernel, 2048, has_tensor_cores=is_half)
