"""One way to compute attention, for comparison."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from nabla_attn.core.grid import TokenGrid


@dataclass(frozen=True)
class Contender:
    """One way to compute attention over raster-order q, k, v.

    Attributes:
        name: as in records and tables.
        run: q, k, v -> output; None when it cannot run.
        why_not: the reason, or None.
        is_dense: attends every pair, so it is held to the dense result.
        grid: the token grid, where its blocks are not the workload's.
        pair_queries: as in `nabla_attention`; with `grid` what its own map depends on.
    """

    name: str
    run: Callable[[Tensor, Tensor, Tensor], Tensor] | None
    why_not: str | None = None
    is_dense: bool = False
    grid: TokenGrid | None = None
    pair_queries: str | None = None

    @property
    def has_own_map(self) -> bool:
        """Whether its map is not the workload's."""
        return self.grid is not None or self.pair_queries is not None
