"""Check an output before it is timed: sampled rows against float64, within an error budget."""

from math import isfinite, sqrt

import torch
from torch import Tensor

from nabla_attn.core.block_map import BlockMap
from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.order import TokenLayout, block_order
from nabla_attn.shapes import Bool, Float, Int

NUM_ROWS = 64


def sample_rows(num_tokens: int, *, seed: int = 0) -> Int[Tensor, " rows"]:
    """Choose the query tokens to check; the first and the last are among them."""
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randperm(num_tokens, generator=generator)[: NUM_ROWS - 2]
    return torch.cat([torch.tensor([0, num_tokens - 1]), inner]).unique()


def token_rows(
    block_map: BlockMap, grid: TokenGrid, rows: Int[Tensor, " rows"]
) -> Bool[Tensor, "batch heads rows tokens"]:
    """Return which tokens the sampled query tokens attend, in raster order."""
    slot = block_order(TokenLayout(grid), block_map.mask.device).to_raster
    block = slot // block_map.block_tokens
    return block_map.mask[:, :, block[rows]][..., block]


def attend_rows(
    q: Float[Tensor, "batch heads rows dim"],
    k: Float[Tensor, "batch heads tokens dim"],
    v: Float[Tensor, "batch heads tokens dim"],
    keep: Bool[Tensor, "batch heads rows tokens"] | None,
) -> Float[Tensor, "batch heads rows dim"]:
    """Compute masked attention of a few rows plainly, each operation in the inputs' dtype."""
    scores = (q @ k.transpose(-1, -2)) / sqrt(q.shape[-1])
    if keep is not None:
        scores = scores.masked_fill(~keep, float("-inf"))
    return scores.softmax(dim=-1) @ v


def check_output(
    out: Float[Tensor, "batch heads tokens dim"],
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch heads tokens dim"],
    v: Float[Tensor, "batch heads tokens dim"],
    rows: Int[Tensor, " rows"],
    keep: Bool[Tensor, "batch heads rows tokens"] | None,
) -> dict[str, float | bool | None]:
    """Compare an output with float64.

    Returns the largest error (None if it is not finite), the budget, and whether it holds.

    The budget is twice the error of an independent run in the inputs' own precision, plus one
    rounding of the largest value.
    """
    exact = attend_rows(q[:, :, rows].double(), k.double(), v.double(), keep)
    plain = attend_rows(q[:, :, rows], k, v, keep)
    error = (out[:, :, rows].double() - exact).abs().max().item()
    rounding = torch.finfo(q.dtype).eps * exact.abs().max().item()
    budget = 2 * (plain.double() - exact).abs().max().item() + rounding
    return {
        "error": error if isfinite(error) else None,
        "budget": budget,
        "passed": error <= budget,
    }
