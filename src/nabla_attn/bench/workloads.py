"""Named shapes of real models, as data, and inputs for them with the structure of a video.

Plain noise would make every row of the map uniform, and zeros would make it meaningless. In smooth
fields plus noise, tokens that are near each other, or alike, attend each other, and one number says
how sharply.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nabla_attn.attention import build_block_map
from nabla_attn.config import SparseConfig
from nabla_attn.core.grid import TokenGrid
from nabla_attn.shapes import Float


@dataclass(frozen=True)
class Workload:
    """One attention layer's shape.

    Attributes:
        name: The name on the command line.
        grid: Latent patch tokens of the video.
        heads: Number of attention heads.
        dim: Dimension of a head.
        source: What has this shape.
        dtype: Data type of queries, keys and values.
        densities: Kept shares of token pairs to measure at.
        is_map_only: Whether only the map is measured, because attention of this length takes too
            long here.
    """

    name: str
    grid: TokenGrid
    heads: int
    dim: int
    source: str
    dtype: torch.dtype = torch.bfloat16
    densities: tuple[float, ...] = (0.08, 0.2)
    is_map_only: bool = False

    def dense_flops(self) -> int:
        """Floating point operations of dense attention, forward: two products."""
        return 4 * self.grid.num_tokens**2 * self.heads * self.dim

    def input_bytes(self) -> int:
        """Bytes of queries, keys, values and output."""
        return 4 * self.grid.num_tokens * self.heads * self.dim * self.dtype.itemsize

    def with_grid(self, grid: TokenGrid) -> "Workload":
        """The same layer on another grid."""
        return replace(self, grid=grid)


_FP32, _CPU = torch.float32, "for a CPU"
_KNOWN = (
    Workload("toy-cpu", TokenGrid(10, 32, 32), 4, 128, _CPU, densities=(0.05, 0.1, 0.2, 0.3)),
    Workload("toy-16k", TokenGrid(16, 32, 32), 2, 128, _CPU, densities=(0.1, 0.2)),
    Workload("map-36k", TokenGrid(9, 64, 64), 12, 128, _CPU, _FP32, (0.2,), is_map_only=True),
    # Ragged: 30 rows, and 45.
    Workload("wan1.3b-480p", TokenGrid(21, 30, 52), 12, 128, "Wan2.1 1.3B, 832x480, 81 frames"),
    Workload("wan14b-720p", TokenGrid(21, 45, 80), 40, 128, "Wan2.1 14B, 1280x720, 81 frames"),
    # As in arXiv:2507.13546, Table 1.
    Workload("paper-768p", TokenGrid(21, 48, 80), 40, 128, "Wan2.1 14B, 1280x768, 81 frames"),
    Workload("kandinsky5-10s", TokenGrid(61, 32, 48), 28, 64, "Kandinsky 5 Lite, 768x512, 10 s"),
    # Without its text.
    Workload("hunyuan-720p", TokenGrid(33, 45, 80), 24, 128, "HunyuanVideo, 1280x720, 129 frames"),
    Workload("long-327k", TokenGrid(80, 64, 64), 40, 128, "a long video", is_map_only=True),
)
WORKLOADS = {work.name: work for work in _KNOWN}


def workload(name: str) -> Workload:
    """Look a workload up by name.

    Raises:
        ValueError: Unknown name; lists the known ones.
    """
    if name not in WORKLOADS:
        raise ValueError(f"unknown workload {name!r}; expected one of {', '.join(WORKLOADS)}.")
    return WORKLOADS[name]


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
