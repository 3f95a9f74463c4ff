"""Other ways to tile FlexAttention for a GPU, as contenders; each is held to its own map."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from nabla_attn import backends
from nabla_attn.attention import build_block_map, nabla_attention
from nabla_attn.backends.flex_options import FlexOptions, flex_options, why_not_flash
from nabla_attn.bench.contenders import Contender
from nabla_attn.bench.workloads import Inputs
from nabla_attn.config import SparseConfig
from nabla_attn.core.block_map import BlockMap
from nabla_attn.core.grid import BlockShape, TokenGrid

BACKEND = "flex"
TALL = BlockShape(1, 16, 8)
# Name, options, pair_queries, blocks. The first has the same map as plain flex.
VARIANTS = (
    ("tiles of 128", FlexOptions(2), None, None),
    ("pairs share the union", FlexOptions(2), "union", None),
    ("pairs pooled", FlexOptions(2), "pool", None),
    ("blocks of 16x8", FlexOptions(), None, TALL),
    ("FLASH, blocks of 16x8", FlexOptions(1, {"BACKEND": "FLASH"}), None, TALL),
)
WITH_BACKWARD = "tiles of 128"


def variants(
    grid: TokenGrid, inputs: Inputs, device: torch.device, needs_grad: bool
) -> list[Contender]:
    """Return all of `VARIANTS` as contenders, with the reason where one cannot run."""
    found = []
    for name, options, pair, block in VARIANTS:
        own = grid if block is None else replace(grid, block=block)
        reason = backends.why_not(BACKEND, device, needs_grad=needs_grad)
        if options.is_flash and reason is None:
            reason = why_not_flash(device, own.block.tokens, options.tile_rows)
        if needs_grad and name != WITH_BACKWARD and reason is None:
            reason = "measured forward only, because each backward compiles for long"
        found.append(
            Contender(
                f"ours (flex, {name})",
                None if reason else _runner(own, inputs, options, pair),
                reason,
                own_map=_own_map(own, inputs.config, pair) if block or pair else None,
                grid=None if block is None else own,
            )
        )
    return found


def _own_map(
    grid: TokenGrid, config: SparseConfig, pair: str | None
) -> Callable[[Tensor, Tensor], BlockMap]:
    return lambda q, k: build_block_map(q, k, grid, replace(config, pair_queries=pair))


def _runner(
    grid: TokenGrid, inputs: Inputs, options: FlexOptions, pair: str | None
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    config = replace(inputs.config, pair_queries=pair)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with flex_options(options):
            return nabla_attention(q, k, v, grid, config, backend=BACKEND)

    return run
