"""One way to compute attention, for comparison."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from nabla_attn.core.block_map import BlockMap
from nabla_attn.core.grid import TokenGrid


@dataclass(frozen=True)
class Contender:
    """One way to compute attention over raster-order q, k, v.

    Attributes:
        name: as in records and tables.
        run: q, k, v -> output; None when it cannot run.
        why_not: the reason, or None.
        is_dense: attends every pair, so it is held to the dense result.
        own_map: q, k -> the map that it attends by, where that is not the workload's.
        grid: the token grid, where its blocks are not the workload's.
    """

    name: str
    run: Callable[[Tensor, Tensor, Tensor], Tensor] | None
    why_not: str | None = None
    is_dense: bool = False
    own_map: Callable[[Tensor, Tensor], BlockMap] | None = None
    grid: TokenGrid | None = None
