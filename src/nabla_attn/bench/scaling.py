"""How seconds grow with tokens, where sparse overtakes dense, and a whole model's forward."""

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


# (heads, layers, feed-forward width, token grid); heads are 128 wide.
CPU_SHAPE = (4, 2, 2048, TokenGrid(10, 32, 32))
WAN_14B_720P = (40, 40, 13824, TokenGrid(21, 45, 80))
HEAD_DIM = 128
TEXT_TOKENS = 512


def measure_model(
    device: torch.device, density: float, *, num_layers: int | None = None, rounds: int = 3
) -> dict[str, Any]:
    """Time one forward of a model with the shape of Wan and random weights, at a given density.

    Args:
        device: The device to run on. A CPU takes a small shape, a GPU that of Wan2.1 14B at
            1280x720.
        density: The share of blocks that every layer keeps, by `topk`, because the maps of random
            weights are flat.
        num_layers: Number of layers, to fit the memory; None takes those of the shape.
        rounds: Number of timed rounds.

    Returns:
        Seconds dense and sparse, the share of attention, and Amdahl's bound on the speed-up.
    """
    from nabla_attn.models import apply

    heads, layers, ffn_dim, grid = CPU_SHAPE if device.type == "cpu" else WAN_14B_720P
    layers = num_layers or layers
    model = _build_model(heads, layers, ffn_dim, device)
    inputs = _build_inputs(grid, device)

    def dense() -> object:
        with torch.no_grad():
            return model(**inputs)

    def sparse() -> object:
        with apply(model, f"topk-{density}", telemetry=False):
            return dense()

    timings = time_in_turn({"dense": dense, "sparse": sparse}, device, rounds=rounds)
    share = attention_share(heads, ffn_dim, grid.num_tokens)
    return {
        "model": "WanTransformer3DModel",
        "heads": heads,
        "layers": layers,
        "tokens": grid.num_tokens,
        "density": density,
        "seconds": {name: timing.to_dict() for name, timing in timings.items()},
        "speed_up": timings["dense"].median / timings["sparse"].median,
        "attention_share_of_flops": share,
        "amdahl_bound": 1 / (1 - share * (1 - density)),
    }


def attention_share(heads: int, ffn_dim: int, num_tokens: int) -> float:
    """Return the share of self-attention in the products of a Wan block."""
    width = heads * HEAD_DIM
    attention = 4 * num_tokens**2 * width
    linear = 2 * num_tokens * (4 * width**2 + 2 * width * ffn_dim)
    cross = 4 * num_tokens * width**2 + 4 * num_tokens * TEXT_TOKENS * width
    return attention / (attention + linear + cross)


def _build_model(heads: int, layers: int, ffn_dim: int, device: torch.device) -> Any:
    from diffusers import WanTransformer3DModel

    with torch.device(device):
        model: Any = WanTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=HEAD_DIM,
            num_layers=layers,
            ffn_dim=ffn_dim,
            text_dim=64,
        )
    return model.to(torch.bfloat16).eval()


def _build_inputs(grid: TokenGrid, device: torch.device) -> dict[str, torch.Tensor]:
    sizes = (1, 16, grid.frames, 2 * grid.height, 2 * grid.width)
    return {
        "hidden_states": torch.randn(sizes, device=device, dtype=torch.bfloat16),
        "timestep": torch.tensor([500], device=device),
        "encoder_hidden_states": torch.randn(
            1, TEXT_TOKENS, 64, device=device, dtype=torch.bfloat16
        ),
    }
