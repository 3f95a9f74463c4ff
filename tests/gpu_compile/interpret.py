"""Run FlexAttention's kernels, as Inductor wrote them for CUDA, in Triton's interpreter on a CPU.

A process of its own: Triton reads TRITON_INTERPRET when it is imported. Reads modules and a case
as a line of JSON, and writes the largest errors against float64, until the input ends.
"""

import json
import os
import re
import sys
from dataclasses import replace
from math import sqrt
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from tests.gpu_compile.kernels import load_source, sources
from torch import Tensor

import nabla_attn as na
from nabla_attn.backends import reference
from nabla_attn.core.block_map import BlockMap
from nabla_attn.core.flex_tables import build_flex_tables, build_layout_tables
from nabla_attn.core.order import TokenLayout, to_blocks
from nabla_attn.core.tail import Tail, add_first_order, build_tail, with_summaries

READ_BY_MASKS = ("valid", "mask", "shown", "columns", "bias")
KINDS = {torch.bool: "i1", torch.int32: "i32", torch.float32: "fp32"}


def templates(codes: list[str], name: str) -> list[tuple[str, str, str]]:
    """Name and source of FlexAttention's kernels, and the modules that call them, in order."""
    # What scales a log-sum-exp, or its gradient, is named behind the kernel.
    wanted = re.compile(rf"triton_tem_fused_{name}(_mul)?_\d+")
    found = [
        (kernel, source, code)
        for code in codes
        for kernel, source in sources(code)
        if wanted.fullmatch(kernel)
    ]
    if not found:
        raise ValueError(f"no kernel for {name}")
    return found


def launch(template: tuple[str, str, str], tensors: dict[str, Tensor], out: Tensor) -> None:
    """Run a kernel on tensors by the names of its parameters; the grid is the module's.

    What masks and scores read has no name: it is found by its shape and type.
    """
    kernel, source, code = template
    plain = re.sub(
        r"@triton_heuristics\.template\(.*?\n\)\n@triton\.jit", "@triton.jit", source, flags=re.S
    )
    function = getattr(load_source(plain), kernel)
    parameters = re.search(rf"def {kernel}\(([^)]*)\)", source)[1].split(", ")
    types = dict(re.findall(r"'(\w+)': '\*(\w+)'", source))
    given = re.search(rf"{kernel}\.run\((.*), stream=", code)[1].split(", ")
    grid = tuple(int(number) for number in given[len(parameters) :])
    symbols: dict[str, int] = {}
    arguments = []
    for parameter, variable in zip(parameters, given, strict=False):
        sizes, strides = declared(code, variable)
        if parameter == "out_ptr0":
            arguments.append(out)
        elif parameter.startswith("in_ptr"):
            (read,) = (
                x
                for x in map(tensors.get, READ_BY_MASKS)
                if x is not None and KINDS[x.dtype] == types[parameter] and has_sizes(x, sizes)
            )
            arguments.append(read)
        elif parameter.startswith("ks"):
            arguments.append(symbols[variable])
        else:
            arguments.append(tensors[parameter.removeprefix("arg_")])
        if sizes:
            x = arguments[-1]
            symbols |= zip(sizes, x.shape, strict=True)
            known = zip(strides, x.stride(), x.shape, strict=True)
            symbols |= {name: stride for name, stride, size in known if size > 1}
    function[grid](*arguments)


def declared(code: str, variable: str) -> tuple[list[str], list[str]]:
    """Sizes and strides that a module asks of an argument, numbers or symbols; none of others."""
    found = re.search(rf"assert_size_stride\({variable}, \(([^)]*)\), \(([^)]*)\)", code)
    sizes, strides = (re.findall(r"\w+", text) for text in (found.groups() if found else ("", "")))
    return sizes, strides


def has_sizes(x: Tensor, sizes: list[str]) -> bool:
    """Whether a tensor has these sizes, of which some may be symbols."""
    return x.dim() == len(sizes) and all(
        not size.isdigit() or int(size) == here for size, here in zip(sizes, x.shape, strict=True)
    )


def main() -> None:
    """Answer requests until the input ends."""
    for line in sys.stdin:
        request = json.loads(line)
        sys.stdout.write(json.dumps(errors(request["codes"], request["case"])) + "\n")
        sys.stdout.flush()


def errors(codes: list[str], case: dict[str, Any]) -> dict[str, float]:
    """Largest differences from float64 of one case, where there is a token or a summary."""
    layout = TokenLayout(na.TokenGrid(*case["grids"][0]), 0, case["num_text"])
    rows = (case.get("options") or {}).get("tile_rows", 1)
    algorithm, _, kind = case["algorithm"].partition("_tail-")
    torch.manual_seed(0)
    shape = (case["batch"], case["heads"], layout.num_tokens, case["dim"])
    raster = [torch.randn(shape) for _ in range(3)]
    text = torch.ones(case["batch"], case["num_text"], dtype=torch.bool)
    text[1:, 2:] = False
    options = {"text_after": case["num_text"], "text_valid": text}
    bmap = na.build_block_map(*raster[:2], layout.grid, algorithm, **options)
    dtype = getattr(torch, case["dtype"])
    q, k, v = (together(to_blocks(x, layout).to(dtype)) for x in raster)
    tail = None
    if kind:
        tail = build_tail(k, v, bmap, layout, kind)
        # Kernels read them rounded.
        keys, values = (x.to(dtype).float() for x in (tail.keys, tail.values))
        tail = replace(tail, keys=keys, values=values)
    tensors = inputs(q, k, v, bmap, tail, rows)
    results = {"out": torch.full_like(q, float("nan"))}
    launch(templates(codes, "flex_attention")[0], tensors, results["out"])
    leaves, exact = exactly(q, k, v, bmap, tail)
    truths = {"out": exact}
    is_token = to_blocks(torch.ones(layout.num_tokens, 1), layout, dim=0)[:, 0] > 0
    if case["needs_backward"]:
        grad = together(torch.randn_like(q) * is_token[:, None])
        results |= gradients(codes, tensors, results["out"], grad)
        dq, *rest = torch.autograd.grad(exact, leaves, grad.double())
        truths |= {"DQ": dq, "DK": torch.cat(rest[::2], 2), "DV": torch.cat(rest[1::2], 2)}
    elif tail is not None and tail.slopes is not None:
        results["out"] = with_first_order(codes, tensors, results["out"], bmap, tail)
    found = {}
    for name, x in results.items():
        counts = torch.nn.functional.pad(is_token, (0, x.shape[2] - len(is_token)), value=True)
        found[name] = (x.double() - truths[name])[:, :, counts].abs().max().item()
    return found


def together(x: Tensor) -> Tensor:
    """The tensor with all heads of a token side by side in memory, as a GPU has them."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def inputs(
    q: Tensor, k: Tensor, v: Tensor, bmap: BlockMap, tail: Tail | None, rows: int
) -> dict[str, Tensor | None]:
    """What the kernels read and write beside their output, by name."""
    shown = bias = None
    order = bmap.order
    if tail is not None:
        shown, bias = tail.shown, torch.nn.functional.pad(tail.bias, (k.shape[2], 0))
        k, v, bmap = with_summaries(k, v, bmap, tail)
    facts = (bmap.mask, bmap.kv_valid, bmap.block_tokens)
    if rows > 1 or tail is not None:
        tables = build_flex_tables(*facts, rows, True, shown)
    else:
        tables = build_layout_tables(*facts, order, True)
    tensors = {
        "Q": q,
        "K": together(k),
        "V": together(v),
        "LSE": torch.zeros(q.shape[:3]),
        "MAX": torch.zeros(q.shape[:3]),
        "valid": tables.valid,
        "mask": tables.mask,
        "shown": tables.shown,
        "columns": tables.columns,
        "bias": bias,
    }
    partial_q, full_q = tables.transposed
    for name, kept in (
        ("KV", tables.partial),
        ("FULL_KV", tables.full),
        ("Q", partial_q),
        ("FULL_Q", full_q),
    ):
        tensors |= {f"{name}_NUM_BLKS": kept.counts, f"{name}_IDX": kept.columns}
    return tensors


def gradients(
    codes: list[str], tensors: dict[str, Tensor | None], out: Tensor, grad: Tensor
) -> dict[str, Tensor]:
    """What the backward writes; NaN where it writes nothing."""
    names = {"DQ": "Q", "DK": "K", "DV": "V"}
    grads = {name: torch.full_like(tensors[of], float("nan")) for name, of in names.items()}
    delta = (out.float() * grad.float()).nan_to_num().sum(-1)
    backward = {"DELTA": delta, "DO": grad, "DQ": grads["DQ"], "DV": grads["DV"]}
    (kernel,) = templates(codes, "flex_attention_backward")
    launch(kernel, tensors | backward, grads["DK"])
    return grads


def with_first_order(
    codes: list[str], tensors: dict[str, Tensor | None], out: Tensor, bmap: BlockMap, tail: Tail
) -> Tensor:
    """The output with the first order, whose mass the kernel that sees summaries alone gives."""
    keys = tensors["K"][:, :, -tail.bias.numel() :]
    alone = replace(bmap, mask=bmap.mask[..., :0], kv_valid=None)
    own = inputs(tensors["Q"], keys[:, :, :0], keys[:, :, :0], alone, tail, 1)
    _, kernel = templates(codes, "flex_attention")
    launch(kernel, own, torch.empty_like(out))
    # Kernels have logarithms to the base of 2.
    mass = (own["LSE"] - tensors["LSE"]).exp2()
    clips = tail.clips.repeat_interleave(bmap.block_tokens)
    scale = 1 / sqrt(out.shape[-1])
    return add_first_order(out, mass, tensors["Q"], clips, tail.slopes, scale)


def exactly(
    q: Tensor, k: Tensor, v: Tensor, bmap: BlockMap, tail: Tail | None
) -> tuple[list[Tensor], Tensor]:
    """The definition in float64, and what it is differentiable in: q, k, v, and summaries."""
    summaries = () if tail is None else (tail.keys, tail.values)
    leaves = [x.double().requires_grad_() for x in (q, k, v, *summaries)]
    if tail is not None:
        tail = replace(tail, keys=leaves[3], values=leaves[4])
    return leaves, reference.attend(*leaves[:3], bmap, tail=tail)


if __name__ == "__main__":
    main()
