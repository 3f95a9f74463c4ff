"""Measure comparably: outputs are checked first, then runs are timed in turn.

Sampled rows are held against float64 within an error budget. Timings are medians with their spread.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender over the rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.seconds)

    def to_dict(self) -> dict[str, float]:
        """The median, the fastest and the slowest round."""
        return {
            "median": round(self.median, 6),
            "min": round(min(self.seconds), 6),
            "max": round(max(self.seconds), 6),
        }


def time_in_turn(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int = 5,
    warmup: int = 1,
) -> dict[str, Timing]:
    """Time every run once per round, in turn, so that a drifting machine favours none.

    Args:
        runs: The functions to time, by name; their results are dropped.
        device: The device whose queue is waited for.
        rounds: Number of timed rounds.
        warmup: Number of rounds before them that are not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_index in range(warmup + rounds):
        for name, run in runs.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if round_index >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Return the peak of device memory that `run` adds, or None where memory is not counted."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def softmax_rate(dtype: torch.dtype, device: torch.device, *, rounds: int = 5) -> float:
    """Measure how many scores a softmax in place takes in a second."""
    scores = torch.randn(512, 4096, device=device).to(dtype)

    def run() -> Tensor:
        return torch.softmax(scores, dim=-1, out=scores)

    timing = time_in_turn({"softmax": run}, device, rounds=rounds)["softmax"]
    return scores.numel() / timing.median


def gather_rate(dtype: torch.dtype, device: torch.device, *, rounds: int = 5) -> float:
    """Measure how many bytes of blocks of keys are gathered in a second."""
    blocks = torch.randn(1024, 64, 128, device=device).to(dtype)
    index = torch.randperm(1024, generator=torch.Generator().manual_seed(0))[:128].to(device)
    out = torch.empty_like(blocks[:128])

    def run() -> Tensor:
        return torch.index_select(blocks, 0, index, out=out)

    timing = time_in_turn({"gather": run}, device, rounds=rounds)["gather"]
    return out.nbytes / timing.median


def matmul_flops(dtype: torch.dtype, device: torch.device, *, rounds: int = 5) -> float:
    """Measure the FLOP/s of one large matrix product, to which attention is compared."""
    size = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timing = time_in_turn({"matmul": lambda: a @ b}, device, rounds=rounds)["matmul"]
    return 2 * size**3 / timing.median
