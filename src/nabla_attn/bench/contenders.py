"""What is measured against what: ways to compute attention, or the reason why one cannot run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nabla_attn import backends
from nabla_attn.attention import nabla_attention
from nabla_attn.bench.workloads import THRESHOLD, Inputs, Workload
from nabla_attn.config import SparseConfig
from nabla_attn.core.block_map import BlockMap
from nabla_attn.core.grid import TokenGrid

_SDPA = {
    "cuda": (
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
    ),
    "cpu": (SDPBackend.FLASH_ATTENTION,),
}


@dataclass(frozen=True)
class Contender:
    """One way to compute attention over raster-order q, k, v.

    Attributes:
        name: The name in records and tables.
        run: The function of q, k, v that returns the output; None when it cannot run.
        why_not: The reason, or None.
        is_dense: Whether it attends every pair, so that it is held to the dense result.
        own_map: The function of q and k that returns the map it attends by, where that is not the
            workload's.
        grid: The token grid, where its blocks are not the workload's.
    """

    name: str
    run: Callable[[Tensor, Tensor, Tensor], Tensor] | None
    why_not: str | None = None
    is_dense: bool = False
    own_map: Callable[[Tensor, Tensor], BlockMap] | None = None
    grid: TokenGrid | None = None


class Baselines(Protocol):
    """What else is measured, beside dense attention and ours."""

    def attention(
        self, grid: TokenGrid, inputs: Inputs, device: torch.device, *, needs_grad: bool
    ) -> list[Contender]:
        """More ways to compute attention."""

    def map_builders(
        self, q_blocks: Tensor, k_blocks: Tensor, window: Tensor, threshold: float
    ) -> Mapping[str, Callable[[], Any]]:
        """More builders of the same map, each a function that returns a `BlockMask`, by name."""


def contenders(
    workload: Workload,
    inputs: Inputs,
    device: torch.device,
    *,
    needs_grad: bool = False,
    baselines: Baselines | None = None,
) -> list[Contender]:
    """Dense attention by every backend of the device, ours, and the baselines."""
    names = ("gather", "flex", *(backends.OTHERS if device.type == "cuda" else ()))
    ours = (_ours(name, workload.grid, inputs, device, needs_grad) for name in names)
    found = [*_dense(device), *ours]
    if baselines is not None:
        found += baselines.attention(workload.grid, inputs, device, needs_grad=needs_grad)
    return found


def list_contenders(
    workload: Workload, device: torch.device, *, baselines: Baselines | None = None
) -> dict[str, tuple[str | None, str | None]]:
    """Every contender's reason not to run, forward and with backward; None where it runs."""
    empty = torch.empty(0)
    inputs = Inputs(empty, empty, empty, SparseConfig(threshold=THRESHOLD), 0.0)
    forward, backward = (
        {
            contender.name: contender.why_not
            for contender in contenders(
                workload, inputs, device, needs_grad=needs_grad, baselines=baselines
            )
        }
        for needs_grad in (False, True)
    )
    return {name: (forward[name], backward[name]) for name in forward}


def _dense(device: torch.device) -> list[Contender]:
    def runner(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        return run

    found = _SDPA.get(device.type, (SDPBackend.MATH,))
    return [
        Contender(f"dense ({backend.name.split('_')[0].lower()})", runner(backend), is_dense=True)
        for backend in found
    ]


def _ours(
    name: str, grid: TokenGrid, inputs: Inputs, device: torch.device, needs_grad: bool
) -> Contender:
    reason = backends.why_not(name, device, needs_grad=needs_grad)
    if reason is not None:
        return Contender(f"ours ({name})", None, reason)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nabla_attention(q, k, v, grid, inputs.config, backend=name)

    return Contender(f"ours ({name})", run)
