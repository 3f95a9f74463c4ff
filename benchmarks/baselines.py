"""What `nabla bench` is compared with: diffusers' NABLA, the reference's map, and other tilings."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from benchmarks.variants import variants
from nabla_attn import backends
from nabla_attn.bench.contenders import Contender
from nabla_attn.bench.workloads import Inputs
from nabla_attn.core.block_map import BlockMap, block_map_of
from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.order import TokenLayout, to_blocks, to_raster


class Baselines:
    """diffusers' NABLA, and other ways to tile FlexAttention."""

    def __init__(self, *, has_variants: bool | None = None) -> None:
        """Choose what is measured.

        Args:
            has_variants: Whether other ways to tile are among it; None has them on CUDA, for which
                they are.
        """
        self.has_variants = has_variants

    def attention(
        self, grid: TokenGrid, inputs: Inputs, device: torch.device, *, needs_grad: bool
    ) -> list[Contender]:
        """More ways to compute attention."""
        has_variants = device.type == "cuda" if self.has_variants is None else self.has_variants
        found = variants(grid, inputs, device, needs_grad) if has_variants else []
        return [*found, _diffusers(grid, inputs, device, needs_grad)]

    def map_builders(
        self, q_blocks: Tensor, k_blocks: Tensor, window: Tensor, threshold: float
    ) -> Mapping[str, Callable[[], Any]]:
        """More builders of the same map, by name."""
        arguments = (q_blocks, k_blocks, window, threshold)
        builders = {"reference, five sorts": lambda: five_sort_map(*arguments)}
        if find_spec("diffusers") is not None:
            builders["diffusers 0.42 nabla_block_mask"] = lambda: diffusers_map(*arguments)
        return builders


def _diffusers(
    grid: TokenGrid, inputs: Inputs, device: torch.device, needs_grad: bool
) -> Contender:
    """Return diffusers' NABLA as a contender, with the reordering that ours has."""
    name = "diffusers NABLA"
    reason = backends.why_not("flex", device, needs_grad=needs_grad)
    if reason is None and grid.is_ragged:
        reason = f"it needs rows and columns in multiples of 8: got {grid}"
    if reason is None and find_spec("diffusers") is None:
        reason = "diffusers is not installed"
    if reason is not None:
        return Contender(name, None, reason)
    threshold = inputs.config.threshold
    assert threshold is not None
    return Contender(
        name,
        diffusers_attention(grid, threshold),
        own_map=lambda q, k: diffusers_block_map(q, k, grid, threshold),
    )


def diffusers_map(
    q_blocks: Tensor, k_blocks: Tensor, window: Tensor | None, threshold: float
) -> BlockMask:
    """Build diffusers' own map of queries and keys that are already in block order."""
    from diffusers.models.transformers.transformer_kandinsky6_sr import nabla_block_mask

    blocks = q_blocks.shape[2] // 64
    nothing = torch.zeros(blocks, blocks, dtype=torch.bool, device=q_blocks.device)
    return nabla_block_mask(q_blocks, k_blocks, nothing if window is None else window, threshold)


def five_sort_map(
    q_blocks: Tensor, k_blocks: Tensor, window: Tensor | None, threshold: float
) -> BlockMask:
    """Build the map by the reference's recipe: a sort and two argsorts, and two for the backward.

    Source: wan/modules/attention.py:256-292 of the authors' repository (facts, not code).
    """
    means = [x.unflatten(2, (-1, 64)).mean(dim=3) for x in (q_blocks, k_blocks)]
    probs = (means[0] @ means[1].mT / q_blocks.shape[-1] ** 0.5).softmax(dim=-1)
    ascending, order = probs.sort(dim=-1)
    keep = (ascending.cumsum(dim=-1) >= 1 - threshold).gather(-1, order.argsort(dim=-1))
    keep = keep if window is None else keep | window
    index = keep.int().argsort(dim=-1, descending=True).int()
    counts = keep.sum(dim=-1).int()
    return BlockMask.from_kv_blocks(
        torch.zeros_like(counts), index, counts, index, BLOCK_SIZE=64, mask_mod=None
    )


def diffusers_block_map(q: Tensor, k: Tensor, grid: TokenGrid, threshold: float) -> BlockMap:
    """Build diffusers' map of q and k in raster order, in the form that ours has.

    It pools, and adds up probabilities, in the inputs' dtype: in bf16 a third of the rows can hold
    a block more or less than exact sums would keep.
    """
    mask = diffusers_map(to_blocks(q, grid), to_blocks(k, grid), None, threshold)
    return block_map_of(mask.to_dense().bool(), TokenLayout(grid))


def diffusers_attention(
    grid: TokenGrid, threshold: float
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return attention by diffusers' map and compiled FlexAttention, its aliased index cloned.

    Uncompiled it would be dense, and with the alias it does not compile on CPU.
    """

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (to_blocks(x, grid) for x in (q, k, v))
        mask = diffusers_map(q, k, None, threshold)
        mask.kv_indices = mask.kv_indices.clone()
        options = {"BLOCK_M": 64, "BLOCK_N": 64} if q.device.type == "cuda" else None
        return to_raster(_compiled_flex()(q, k, v, block_mask=mask, kernel_options=options), grid)

    return run


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=False)
