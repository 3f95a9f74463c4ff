"""Measure the map alone: beside other builders of the same map, and beside dense attention."""

from typing import Any

import torch
import torch.nn.functional as F

from nabla_attn.attention import build_block_map
from nabla_attn.bench.contenders import Baselines
from nabla_attn.bench.inputs import THRESHOLD, make_inputs
from nabla_attn.bench.measure import time_in_turn
from nabla_attn.bench.workloads import Workload
from nabla_attn.config import SparseConfig
from nabla_attn.core.order import to_blocks
from nabla_attn.core.window import build_window_map

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
