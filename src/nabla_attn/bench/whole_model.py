"""Measure a whole transformer forward, dense and sparse, beside the bound of Amdahl's law."""

from typing import Any

import torch

from nabla_attn.bench.measure import time_in_turn
from nabla_attn.core.grid import TokenGrid

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
