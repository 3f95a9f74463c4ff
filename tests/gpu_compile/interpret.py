"""Run FlexAttention's kernels, as Inductor wrote them for CUDA, in Triton's interpreter on a CPU.

A process of its own: Triton reads TRITON_INTERPRET when it is imported. Reads modules and a case
as a line of JSON, and writes the largest errors against float64, until the input ends.
"""

import json
import os
import re
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from tests.gpu_compile.kernels import load_source, sources
from torch import Tensor

import nabla_attn as na
from nabla_attn.backends import reference
from nabla_attn.core.block_map import BlockMap
from nabla_attn.core.flex_tables import build_layout_tables
from nabla_attn.core.order import TokenLayout, to_blocks


def template(codes: list[str], name: str) -> tuple[str, str, str]:
    """Name and source of FlexAttention's kernel, and the module that calls it."""
    for code in codes:
        for kernel, source in sources(code):
            if re.fullmatch(rf"triton_tem_fused_{name}_\d+", kernel):
                return kernel, source, code
    raise ValueError(f"no kernel for {name}")


def launch(codes: list[str], name: str, tensors: dict[str, Tensor], out: Tensor) -> None:
    """Run a kernel on tensors by the names of its parameters; the grid is the module's."""
    kernel, source, code = template(codes, name)
    plain = re.sub(
        r"@triton_heuristics\.template\(.*?\n\)\n@triton\.jit", "@triton.jit", source, flags=re.S
    )
    function = getattr(load_source(plain), kernel)
    parameters = re.search(rf"def {kernel}\(([^)]*)\)", source)[1].split(", ")
    given = re.search(rf"{kernel}\.run\((.*), stream=", code)[1].split(", ")
    grid = tuple(int(number) for number in given[len(parameters) :])
    arguments = []
    for parameter, variable in zip(parameters, given, strict=False):
        if parameter == "out_ptr0":
            arguments.append(out)
        elif parameter.startswith("in_ptr"):
            # What the mask reads: the map has four axes, valid keys two.
            shape = re.search(rf"assert_size_stride\({variable}, \(([^)]*)\)", code)[1]
            arguments.append(tensors["mask" if shape.count(",") == 3 else "valid"])
        else:
            arguments.append(tensors[parameter.removeprefix("arg_")])
    function[grid](*arguments)


def main() -> None:
    """Answer requests until the input ends."""
    for line in sys.stdin:
        request = json.loads(line)
        sys.stdout.write(json.dumps(errors(request["codes"], request["case"])) + "\n")
        sys.stdout.flush()


def errors(codes: list[str], case: dict[str, Any]) -> dict[str, float]:
    """Forward and backward of one case."""
    grid = na.TokenGrid(*case["grids"][0])
    layout = TokenLayout(grid, 0, case["num_text"])
    rows = (case.get("options") or {}).get("tile_rows", 1)
    torch.manual_seed(0)
    shape = (case["batch"], case["heads"], layout.num_tokens, case["dim"])
    raster = [torch.randn(shape) for _ in range(3)]
    valid = torch.ones(case["batch"], case["num_text"], dtype=torch.bool)
    valid[1:, 2:] = False
    bmap = na.build_block_map(
        *raster[:2], grid, "nabla-0.4", text_after=case["num_text"], text_valid=valid
    )
    # All heads of a token lie together, as a GPU has them.
    q, k, v = (
        to_blocks(x, layout).to(getattr(torch, case["dtype"])).transpose(1, 2).contiguous()
        for x in raster
    )
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    tables = bmap.flex_tables(rows, needs_backward=True)
    if rows == 1:
        facts = (bmap.mask, bmap.kv_valid, bmap.block_tokens, bmap.order)
        tables = build_layout_tables(*facts, needs_backward=True)
    partial_q, full_q = tables.transposed
    tensors = {
        "Q": q,
        "K": k,
        "V": v,
        "LSE": torch.zeros(q.shape[:3]),
        "MAX": torch.zeros(q.shape[:3]),
        "valid": tables.valid,
        "mask": tables.mask,
    }
    for name, kept in (
        ("KV", tables.partial),
        ("FULL_KV", tables.full),
        ("Q", partial_q),
        ("FULL_Q", full_q),
    ):
        tensors |= {f"{name}_NUM_BLKS": kept.counts, f"{name}_IDX": kept.columns}
    out = torch.full_like(q, float("nan"))
    launch(codes, "flex_attention", tensors, out)
    return compare(codes, tensors, out, bmap, layout, case["needs_backward"])


def compare(
    codes: list[str],
    tensors: dict[str, Tensor],
    out: Tensor,
    bmap: BlockMap,
    layout: TokenLayout,
    needs_backward: bool,
) -> dict[str, float]:
    """Largest differences from float64 at slots that hold tokens, and the largest values."""
    is_token = to_blocks(torch.ones(layout.num_tokens, 1), layout, dim=0)[:, 0] > 0
    exact_inputs = [tensors[name].double().requires_grad_() for name in "QKV"]
    exact = reference.attend(*exact_inputs, bmap)
    results, truths = {"out": out}, {"out": exact}
    if needs_backward:
        grad = torch.randn_like(out) * is_token[:, None]
        grads = {name: torch.full_like(out, float("nan")) for name in ("DQ", "DK", "DV")}
        delta = (out.float() * grad.float()).nan_to_num().sum(-1)
        backward = {"DELTA": delta, "DO": grad, "DQ": grads["DQ"], "DV": grads["DV"]}
        launch(codes, "flex_attention_backward", tensors | backward, grads["DK"])
        results |= grads
        found = torch.autograd.grad(exact, exact_inputs, grad.double())
        truths |= dict(zip(("DQ", "DK", "DV"), found, strict=True))
    return {
        name: ((x.double() - truths[name])[:, :, is_token].abs().max()).item()
        for name, x in results.items()
    }


if __name__ == "__main__":
    main()
