"""Named shapes of real models, as data."""

from dataclasses import dataclass, replace

import torch

from nabla_attn.core.grid import TokenGrid


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
        ValueError: unknown name; lists the known ones.
    """
    if name not in WORKLOADS:
        raise ValueError(f"unknown workload {name!r}; expected one of {', '.join(WORKLOADS)}.")
    return WORKLOADS[name]
