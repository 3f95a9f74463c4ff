"""Queries, keys and values with the structure of a video: smooth fields plus noise.

Plain noise would make every row of the map uniform, and zeros would make it meaningless. Here
tokens that are near each other, or alike, attend each other, and one number says how sharply.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nabla_attn.attention import build_block_map
from nabla_attn.bench.workloads import Workload
from nabla_attn.config import SparseConfig
from nabla_attn.core.grid import TokenGrid
from nabla_attn.shapes import Float

THRESHOLD = 0.6
# The sharpness is found on these many heads; the others come out near them.
_CALIBRATION_HEADS = 4
# Waves across the video along (frames, height, width).
_WAVES = (2.0, 3.0, 3.0)


@dataclass(frozen=True)
class Inputs:
    """Queries, keys and values of one layer, and the algorithm that reaches a wanted density.

    Attributes:
        q: Queries, [1, heads, tokens, dim], in raster order.
        k: Keys of the same shape.
        v: Values of the same shape.
        config: The algorithm, `nabla` at THRESHOLD.
        sharpness: The strength of the fields that gave the density.
    """

    q: Float[Tensor, "1 heads tokens dim"]
    k: Float[Tensor, "1 heads tokens dim"]
    v: Float[Tensor, "1 heads tokens dim"]
    config: SparseConfig
    sharpness: float


def make_inputs(
    workload: Workload, density: float, device: torch.device, *, seed: int = 0
) -> Inputs:
    """Make inputs whose map at THRESHOLD keeps about `density` of the token pairs.

    The sharpness is found on the first heads by bisection.
    """
    config = SparseConfig(threshold=THRESHOLD)
    sharpness = _calibrate(workload, density, config, device, seed)
    fields = _fields(workload.grid, workload.heads, workload.dim, sharpness, device, seed)
    q, k, v = (x.to(workload.dtype) for x in fields)
    return Inputs(q, k, v, config, sharpness)


def _calibrate(
    workload: Workload, density: float, config: SparseConfig, device: torch.device, seed: int
) -> float:
    low, high = 0.0, 8.0
    for _ in range(10):
        sharpness = (low + high) / 2
        heads = min(workload.heads, _CALIBRATION_HEADS)
        q, k, _ = _fields(workload.grid, heads, workload.dim, sharpness, device, seed)
        is_too_dense = build_block_map(q, k, workload.grid, config).density > density
        low, high = (sharpness, high) if is_too_dense else (low, sharpness)
    return (low + high) / 2


def _fields(
    grid: TokenGrid, heads: int, dim: int, sharpness: float, device: torch.device, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    options: Any = {"generator": generator, "device": device}
    sizes = (grid.frames, grid.height, grid.width)
    axes = [torch.linspace(0, 1, size, device=device) for size in sizes]
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).view(-1, 3)
    parts: list[Tensor] = []
    for _ in range(heads):
        waves = torch.randn(3, dim, **options) * 2 * torch.pi
        waves *= torch.tensor(_WAVES, device=device)[:, None]
        phases = torch.rand(dim, **options) * 2 * torch.pi
        field = sharpness * torch.cos(place @ waves + phases)
        noise = torch.randn(3, grid.num_tokens, dim, **options)
        noise[:2] += field
        parts.append(noise)
    q, k, v = torch.stack(parts, dim=1)[:, None]
    return q, k, v
