"""Where the time of one attention call goes: reorder, map, attention itself."""

from typing import Any

import torch

from nabla_attn import backends
from nabla_attn.bench.inputs import Inputs
from nabla_attn.bench.measure import time_in_turn
from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.order import TokenLayout, to_blocks, to_raster
from nabla_attn.mapping import map_blocks


def measure_stages(
    grid: TokenGrid, inputs: Inputs, device: torch.device, *, rounds: int
) -> dict[str, Any]:
    """Seconds of each stage of a forward, run alone, by the backend that "auto" takes here.

    "reorder" is q, k and v into block order and the output back.
    """
    layout = TokenLayout(grid)
    q, k, v = inputs.q, inputs.k, inputs.v
    attend = backends.resolve("auto", q, k, v)
    blocks = [to_blocks(x, layout) for x in (q, k, v)]
    block_map = map_blocks(blocks[0], blocks[1], layout, inputs.config)

    def reorder() -> object:
        return [to_blocks(x, layout) for x in (q, k, v)], to_raster(blocks[0], layout)

    timings = time_in_turn(
        {
            "reorder": reorder,
            "map": lambda: map_blocks(blocks[0], blocks[1], layout, inputs.config),
            "attention": lambda: attend(*blocks, block_map, scale=None),
        },
        device,
        rounds=rounds,
    )
    return {name: timing.to_dict() for name, timing in timings.items()}
