"""Named shapes of real models, as data."""

from dataclasses import dataclass, replace

import torch

from nabla_attn.core.grid import TokenGrid


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One attention layer's shape.

    Attributes:
        name: how the command line calls it.
        grid: latent patch tokens of the video.
        heads: attention heads.
        dim: dimension of a head.
        dtype: of queries, keys and values.
        densities: kept shares of token pairs to measure at.
        is_map_only: attention of this length is too long to run here; only the map is measured.
        source: what the shape is.
    """

    name: str
    grid: TokenGrid
    heads: int
    dim: int
    dtype: torch.dtype = torch.bfloat16
    densities: tuple[float, ...] = (0.08, 0.2)
    is_map_only: bool = False
    source: str

    def dense_flops(self) -> int:
        """Floating point operations of dense attention, forward: two products."""
        return 4 * self.grid.num_tokens**2 * self.heads * self.dim

    def input_bytes(self) -> int:
        """Bytes of queries, keys, values and output."""
        return 4 * self.grid.num_tokens * self.heads * self.dim * self.dtype.itemsize

    def with_grid(self, grid: TokenGrid) -> "Workload":
        """The same layer on another grid."""
        return replace(self, grid=grid)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            name="toy-cpu",
            grid=TokenGrid(10, 32, 32),
            heads=4,
            dim=128,
            densities=(0.05, 0.1, 0.2, 0.3),
            source="10,240 tokens in four heads of 128, for a CPU",
        ),
        Workload(
            name="toy-16k",
            grid=TokenGrid(16, 32, 32),
            heads=2,
            dim=128,
            densities=(0.1, 0.2),
            source="16,384 tokens in two heads of 128, for a CPU",
        ),
        Workload(
            name="map-36k",
            grid=TokenGrid(9, 64, 64),
            heads=12,
            dim=128,
            dtype=torch.float32,
            densities=(0.2,),
            is_map_only=True,
            source="36,864 tokens in 12 heads of 128, map only",
        ),
        Workload(
            name="wan1.3b-480p",
            grid=TokenGrid(21, 30, 52),
            heads=12,
            dim=128,
            source="Wan2.1 1.3B, 832x480, 81 frames (ragged: 30 rows)",
        ),
        Workload(
            name="wan14b-720p",
            grid=TokenGrid(21, 45, 80),
            heads=40,
            dim=128,
            source="Wan2.1 14B, 1280x720, 81 frames (ragged: 45 rows)",
        ),
        Workload(
            name="paper-768p",
            grid=TokenGrid(21, 48, 80),
            heads=40,
            dim=128,
            source="Wan2.1 14B, 1280x768, 81 frames, as in arXiv:2507.13546 Table 1",
        ),
        Workload(
            name="kandinsky5-10s",
            grid=TokenGrid(61, 32, 48),
            heads=28,
            dim=64,
            source="Kandinsky 5 Lite, 768x512, 10 s",
        ),
        Workload(
            name="hunyuan-720p",
            grid=TokenGrid(33, 45, 80),
            heads=24,
            dim=128,
            source="HunyuanVideo, 1280x720, 129 frames, without its text",
        ),
        Workload(
            name="long-327k",
            grid=TokenGrid(80, 64, 64),
            heads=40,
            dim=128,
            is_map_only=True,
            source="327,680 tokens in 40 heads, map only",
        ),
    )
}


def workload(name: str) -> Workload:
    """Look a workload up by name.

    Raises:
        ValueError: unknown name; lists the known ones.
    """
    if name not in WORKLOADS:
        raise ValueError(f"unknown workload {name!r}; expected one of {', '.join(WORKLOADS)}.")
    return WORKLOADS[name]
