"""What is measured against what: name -> attention function, or the reason why it cannot run."""

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nabla_attn import backends
from nabla_attn.attention import nabla_attention
from nabla_attn.bench.contender import Contender
from nabla_attn.bench.inputs import THRESHOLD, Inputs
from nabla_attn.bench.variants import variants
from nabla_attn.bench.workloads import Workload
from nabla_attn.config import SparseConfig
from nabla_attn.core.grid import TokenGrid

_SDPA = {
    "cuda": (
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
    ),
    "cpu": (SDPBackend.FLASH_ATTENTION,),
}


def contenders(
    workload: Workload,
    inputs: Inputs,
    device: torch.device,
    *,
    needs_grad: bool = False,
    has_variants: bool | None = None,
) -> list[Contender]:
    """Dense attention by every backend of the device, ours, and diffusers' own NABLA.

    `has_variants` adds other ways to tile; None does so on CUDA, for which they are.
    """
    if has_variants is None:
        has_variants = device.type == "cuda"
    more = variants(workload.grid, inputs, device, needs_grad) if has_variants else []
    return [
        *_dense(device),
        *(_ours(name, workload.grid, inputs, device, needs_grad) for name in ("gather", "flex")),
        *more,
        _diffusers(workload.grid, inputs, device, needs_grad),
    ]


def list_contenders(
    workload: Workload, device: torch.device
) -> dict[str, tuple[str | None, str | None]]:
    """Every contender's reason not to run, forward and with backward; None where it runs."""
    empty = torch.empty(0)
    inputs = Inputs(empty, empty, empty, SparseConfig(threshold=THRESHOLD), 0.0)
    forward, backward = (
        {
            c.name: c.why_not
            for c in contenders(workload, inputs, device, needs_grad=needs_grad, has_variants=True)
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


def _diffusers(
    grid: TokenGrid, inputs: Inputs, device: torch.device, needs_grad: bool
) -> Contender:
    """diffusers' map and compiled FlexAttention, reordered as ours."""
    name = "diffusers NABLA"
    reason = backends.why_not("flex", device, needs_grad=needs_grad)
    if reason is None and grid.is_ragged:
        reason = f"it needs rows and columns in multiples of 8: got {grid}"
    if reason is not None:
        return Contender(name, None, reason)
    if find_spec("diffusers") is None:
        return Contender(name, None, "diffusers is not installed")
    from nabla_attn.bench.rivals import diffusers_attention, diffusers_block_map

    threshold = inputs.config.threshold
    assert threshold is not None
    return Contender(
        name,
        diffusers_attention(grid, threshold),
        own_map=lambda q, k: diffusers_block_map(q, k, grid, threshold),
    )
