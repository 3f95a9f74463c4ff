"""Measure how time grows with tokens, and below which length dense attention is faster."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from nabla_attn.attention import build_block_map, nabla_attention
from nabla_attn.bench.measure import time_in_turn
from nabla_attn.bench.workloads import Inputs, Workload, make_inputs, workload
from nabla_attn.core.grid import TokenGrid
from nabla_attn.progress import ProgressCallback, ignore_progress

# Frames of 32x32 tokens: attention to 65,536 tokens, the map alone to 327,680.
ATTENTION_FRAMES = (2, 4, 8, 16, 32, 64)
MAP_FRAMES = (*ATTENTION_FRAMES, 128, 320)
CROSSOVER_GRIDS = ((1, 16, 16), (2, 16, 16), (4, 16, 16), (4, 24, 24), (4, 32, 32), (8, 32, 32))
CROSSOVER_DENSITIES = (0.1, 0.2, 0.3, 0.5, 0.7)


def measure_scaling(
    device: torch.device, *, rounds: int = 3, on_progress: ProgressCallback = ignore_progress
) -> list[dict[str, Any]]:
    """Time dense attention, sparse attention and the map at growing lengths, and fit exponents."""
    base = workload("toy-cpu")
    points: list[dict[str, Any]] = []
    for index, frames in enumerate(MAP_FRAMES):
        work = base.with_grid(TokenGrid(frames, 32, 32))
        on_progress(f"{work.grid.num_tokens} tokens", index, len(MAP_FRAMES))
        inputs = make_inputs(work, 0.2, device)
        runs = _runs(work.grid, inputs, has_attention=frames in ATTENTION_FRAMES)
        timings = time_in_turn(runs, device, rounds=rounds)
        seconds = {name: timing.median for name, timing in timings.items()}
        density = build_block_map(inputs.q, inputs.k, work.grid, inputs.config).density
        points.append({"tokens": work.grid.num_tokens, "density": density, "seconds": seconds})
    return [{"points": points, "exponents": fit_exponents(points)}]


def _runs(grid: TokenGrid, inputs: Inputs, *, has_attention: bool) -> dict[str, Any]:
    q, k, v, config = inputs.q, inputs.k, inputs.v, inputs.config
    runs: dict[str, Any] = {"map": lambda: build_block_map(q, k, grid, config)}
    if has_attention:
        runs["dense"] = lambda: F.scaled_dot_product_attention(q, k, v)
        runs["sparse"] = lambda: nabla_attention(q, k, v, grid, config)
    return runs


def fit_exponents(points: list[dict[str, Any]]) -> dict[str, float]:
    """Fit the slope of log seconds over log tokens for each curve, by least squares."""
    exponents = {}
    for name in ("dense", "sparse", "map"):
        found = [(p["tokens"], p["seconds"][name]) for p in points if name in p["seconds"]]
        tokens, seconds = np.log(np.array(found, dtype=float)).T
        exponents[name] = float(np.polyfit(tokens, seconds, deg=1)[0])
    return exponents


def measure_crossover(
    device: torch.device, *, rounds: int = 3, on_progress: ProgressCallback = ignore_progress
) -> list[dict[str, Any]]:
    """Measure the speed-up over dense attention on small grids at growing densities."""
    base = workload("toy-cpu")
    results = []
    for index, sizes in enumerate(CROSSOVER_GRIDS):
        work = base.with_grid(TokenGrid(*sizes))
        on_progress(f"{work.grid.num_tokens} tokens", index, len(CROSSOVER_GRIDS))
        for density in CROSSOVER_DENSITIES:
            results.append(_crossover_point(work, density, device, rounds))
    return results


def _crossover_point(
    work: Workload, density: float, device: torch.device, rounds: int
) -> dict[str, Any]:
    inputs = make_inputs(work, density, device)
    q, k, v = inputs.q, inputs.k, inputs.v
    timings = time_in_turn(
        {
            "dense": lambda: F.scaled_dot_product_attention(q, k, v),
            "sparse": lambda: nabla_attention(q, k, v, work.grid, inputs.config),
        },
        device,
        rounds=rounds,
    )
    return {
        "tokens": work.grid.num_tokens,
        "density": build_block_map(q, k, work.grid, inputs.config).density,
        "speed_up": timings["dense"].median / timings["sparse"].median,
    }
