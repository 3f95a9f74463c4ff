"""Measure attention of one workload, and its map: check every contender, then time in turn."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nabla_attn import backends
from nabla_attn.attention import build_block_map
from nabla_attn.bench.contenders import Baselines, Contender, contenders
from nabla_attn.bench.measure import (
    check_output,
    gather_rate,
    matmul_flops,
    peak_bytes,
    sample_rows,
    softmax_rate,
    time_in_turn,
    token_rows,
)
from nabla_attn.bench.workloads import THRESHOLD, Inputs, Workload, make_inputs
from nabla_attn.block_selection import select_blocks
from nabla_attn.config import SparseConfig
from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.order import TokenLayout, to_blocks, to_raster
from nabla_attn.core.window import build_window_map


def measure_attention(
    workload: Workload,
    density: float,
    device: torch.device,
    *,
    backward: bool = False,
    rounds: int = 5,
    baselines: Baselines | None = None,
) -> dict[str, Any]:
    """Check and time every contender at one density.

    Args:
        workload: The shape.
        density: The wanted share of kept token pairs; the true one is in the result.
        device: The device to run on.
        backward: Whether forward and backward are timed together.
        rounds: Number of timed rounds.
        baselines: What else is measured.

    Returns:
        Plain numbers for a record. For each contender they are the result of its check, its
        seconds, its speed-up over the fastest dense one, its share of the ideal (speed-up x
        density), and its useful FLOP/s, also as a share of those of a matrix product; for each
        sparse one, the share of what stock operations could reach. A forward has the seconds of
        each of our stages too.
    """
    inputs = make_inputs(workload, density, device)
    block_map = build_block_map(inputs.q, inputs.k, workload.grid, inputs.config)
    kept = block_map.density
    rows = sample_rows(workload.grid.num_tokens)
    keep = token_rows(block_map, workload.grid, rows)
    ceiling = matmul_flops(workload.dtype, device)
    stock = _stock_seconds(workload, kept, ceiling, device, backward=backward)
    results: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], object]] = {}
    for contender in contenders(workload, inputs, device, needs_grad=backward, baselines=baselines):
        if contender.run is None:
            results[contender.name] = {"why_not": contender.why_not}
            continue
        try:
            result, run = _check(contender, workload, inputs, rows, keep, backward, device)
        except RuntimeError as error:
            # A kernel that does not compile or fit here must not end the others' run.
            reason = str(error).strip().splitlines() or [type(error).__name__]
            results[contender.name] = {"why_not": f"it failed: {reason[0]}"}
            continue
        results[contender.name] = result
        if result["gate"]["passed"]:
            runs[contender.name] = run
    timings = time_in_turn(runs, device, rounds=rounds)
    dense = min((timings[n].median for n in timings if results[n]["is_dense"]), default=None)
    # The backward has five products where the forward has two.
    flops = workload.dense_flops() * (3.5 if backward else 1)
    for name, timing in timings.items():
        # A contender whose own map keeps more does no more useful work.
        own = min(kept, results[name].get("density", kept))
        useful = flops * (1 if results[name]["is_dense"] else own)
        results[name]["seconds"] = timing.to_dict()
        results[name]["flops_per_second"] = useful / timing.median
        results[name]["share_of_matmul"] = useful / timing.median / ceiling
        if not results[name]["is_dense"]:
            results[name]["share_of_stock"] = own / kept * stock / timing.median
        if dense is not None:
            results[name]["speed_up"] = dense / timing.median
            results[name]["share_of_ideal"] = useful / flops * dense / timing.median
    result = {
        "workload": workload.name,
        "dtype": str(workload.dtype).removeprefix("torch."),
        "density": kept,
        "algorithm": str(inputs.config),
        "sharpness": inputs.sharpness,
        "direction": "forward+backward" if backward else "forward",
        "matmul_flops_per_second": ceiling,
        "stock_seconds": stock,
        "contenders": results,
    }
    if not backward:
        result["stages"] = _measure_stages(workload.grid, inputs, device, rounds=rounds)
    return result


def _stock_seconds(
    workload: Workload, density: float, flops: float, device: torch.device, *, backward: bool
) -> float:
    """The seconds that stock operations need: products, softmax, and one read of what is gathered.

    Each runs at its rate on this device. A backward has five products for the forward's two, and
    computes the softmax and gathers keys and values once more.
    """
    tokens, block = workload.grid.num_tokens, workload.grid.block.tokens
    scores = density * workload.heads * tokens**2
    gathered = 2 * scores / block * workload.dim * workload.dtype.itemsize
    products = density * workload.dense_flops() * (3.5 if backward else 1) / flops
    softmax = scores / softmax_rate(workload.dtype, device)
    read = gathered / gather_rate(workload.dtype, device)
    return products + (softmax + read) * (2 if backward else 1)


def _check(
    contender: Contender,
    workload: Workload,
    inputs: Inputs,
    rows: Tensor,
    keep: Tensor,
    backward: bool,
    device: torch.device,
) -> tuple[dict[str, Any], Callable[[], object]]:
    """Check a contender; returns its first results and the function to time."""
    assert contender.run is not None
    result: dict[str, Any] = {"is_dense": contender.is_dense}
    if contender.own_map is not None:
        own = contender.own_map(inputs.q, inputs.k)
        keep = token_rows(own, contender.grid or workload.grid, rows)
        result["density"] = own.density
    result["gate"] = _gate(contender, inputs, rows, keep)
    run = _runner(contender.run, inputs, backward)
    if result["gate"]["passed"]:
        result["peak_bytes"] = peak_bytes(run, device)
    return result, run


def _gate(contender: Contender, inputs: Inputs, rows: Tensor, keep: Tensor) -> dict[str, Any]:
    assert contender.run is not None
    with torch.no_grad():
        out = contender.run(inputs.q, inputs.k, inputs.v)
    seen = None if contender.is_dense else keep
    return check_output(out, inputs.q, inputs.k, inputs.v, rows, seen)


def _runner(
    run: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Inputs, backward: bool
) -> Callable[[], object]:
    if not backward:

        def forward() -> Tensor:
            with torch.no_grad():
                return run(inputs.q, inputs.k, inputs.v)

        return forward
    leaves = [x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    grad = torch.randn_like(leaves[0])

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(*leaves), leaves, grad)

    return both


def _measure_stages(
    grid: TokenGrid, inputs: Inputs, device: torch.device, *, rounds: int
) -> dict[str, Any]:
    """Time each stage of a forward alone, with the backend that "auto" takes here.

    "reorder" is q, k and v into block order and the output back.
    """
    layout = TokenLayout(grid)
    q, k, v = inputs.q, inputs.k, inputs.v
    attend = backends.resolve("auto", q, k, v)
    blocks = [to_blocks(x, layout) for x in (q, k, v)]
    block_map = select_blocks(blocks[0], blocks[1], layout, inputs.config)

    def reorder() -> object:
        return [to_blocks(x, layout) for x in (q, k, v)], to_raster(blocks[0], layout)

    timings = time_in_turn(
        {
            "reorder": reorder,
            "map": lambda: select_blocks(blocks[0], blocks[1], layout, inputs.config),
            "attention": lambda: attend(*blocks, block_map, scale=None),
        },
        device,
        rounds=rounds,
    )
    return {name: timing.to_dict() for name, timing in timings.items()}


WINDOW = (3, 3, 3)
OURS = "ours (raster order in)"


def measure_maps(
    workload: Workload,
    density: float,
    device: torch.device,
    *,
    rounds: int = 5,
    baselines: Baselines | None = None,
) -> dict[str, Any]:
    """Time the builders of one map, after checking that they build the same one.

    Ours starts from raster order; the baselines are given block order for free.

    Returns:
        Plain numbers for a record: seconds per builder, the ratio to ours, entries that differ.
    """
    inputs = make_inputs(workload, density, device)
    grid, q, k = workload.grid, inputs.q, inputs.k
    config = SparseConfig(threshold=THRESHOLD, window=WINDOW)
    builders: dict[str, Any] = {OURS: lambda: build_block_map(q, k, grid, config)}
    if baselines is not None:
        window = build_window_map(grid, WINDOW, device)
        q_blocks, k_blocks = (to_blocks(x, grid) for x in (q, k))
        builders |= baselines.map_builders(q_blocks, k_blocks, window, THRESHOLD)
    ours = build_block_map(q, k, grid, config)
    differing = {
        name: int((build().to_dense().bool() != ours.mask).sum())
        for name, build in builders.items()
        if name != OURS
    }
    timings = time_in_turn(builders, device, rounds=rounds)
    base = timings[OURS].median
    return {
        "workload": workload.name,
        "algorithm": str(config),
        "density": ours.density,
        "entries": ours.mask.numel(),
        "differing_entries": differing,
        "seconds": {name: timing.to_dict() for name, timing in timings.items()},
        "times_slower_than_ours": {name: t.median / base for name, t in timings.items()},
    }


def measure_map_share(
    workload: Workload, density: float, device: torch.device, *, rounds: int = 5
) -> dict[str, Any]:
    """Time the map and dense attention on the same inputs."""
    inputs = make_inputs(workload, density, device)
    q, k, v = inputs.q, inputs.k, inputs.v
    timings = time_in_turn(
        {
            "map": lambda: build_block_map(q, k, workload.grid, inputs.config),
            "dense": lambda: F.scaled_dot_product_attention(q, k, v),
        },
        device,
        rounds=rounds,
    )
    return {
        "workload": workload.name,
        "dtype": str(workload.dtype).removeprefix("torch."),
        "seconds": {name: timing.to_dict() for name, timing in timings.items()},
        "map_share_of_dense": timings["map"].median / timings["dense"].median,
    }
