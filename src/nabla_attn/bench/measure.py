"""Timing that can be compared: runs take turns in one process; medians with their spread."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


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


def matmul_flops(dtype: torch.dtype, device: torch.device, *, rounds: int = 5) -> float:
    """Measure the FLOP/s of one large matrix product, to which attention is compared."""
    size = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timing = time_in_turn({"matmul": lambda: a @ b}, device, rounds=rounds)["matmul"]
    return 2 * size**3 / timing.median
