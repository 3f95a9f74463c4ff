"""From which length on sparse attention wins on this machine: `nabla bench --crossover`."""

import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from nabla_attn.machine import machine_file
from nabla_attn.record import RunRecord

KIND = "bench-crossover"


def crossover_file(device: torch.device) -> Path:
    """Where the record of this machine lies."""
    return machine_file("crossover", device)


def min_tokens(results: list[dict[str, Any]], *, density: float = 0.3) -> int | None:
    """The shortest measured length from which sparse wins at `density` or less; None if never."""
    lengths = sorted({point["tokens"] for point in results})
    for length in lengths:
        longer = [p for p in results if p["tokens"] >= length and p["density"] <= density]
        if longer and all(point["speed_up"] > 1 for point in longer):
            return int(length)
    return None


def load_min_tokens(path: str | Path) -> int:
    """`min_tokens` of a record; where sparse never won, one more than the longest measured.

    Raises:
        ValueError: no such file, or it is not a record of `nabla bench --crossover`.
    """
    try:
        record = RunRecord.load(path)
    except OSError as error:
        raise ValueError(f"crossover record {path}: {error.strerror}.") from error
    try:
        if record.kind != KIND:
            raise ValueError(f"its kind is {record.kind!r}")
        results = record.numbers["results"]
        return min_tokens(results) or max(int(point["tokens"]) for point in results) + 1
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a record of `nabla bench --crossover` ({error}). Measure again."
        ) from error


def min_tokens_here(device: torch.device, default: int) -> int:
    """`load_min_tokens` of this machine's record; without one `default`, and one warning."""
    path = crossover_file(device)
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        # No file, or one of another user's home: containers keep the home of root.
        _warn_once(path, default)
        return default
    return _load_once(path, changed)


@lru_cache(maxsize=32)
def _warn_once(path: Path, default: int) -> None:
    warnings.warn(
        f"min_tokens='auto' finds no record of this machine at {path}, so {default} stays. Measure "
        "once with `nabla bench --crossover`.",
        stacklevel=3,
    )


@lru_cache(maxsize=32)
def _load_once(path: Path, changed: int) -> int:
    return load_min_tokens(path)
