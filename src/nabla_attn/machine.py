"""What this machine computes in, and what was measured on it.

Measurements are files in the user's cache, by device and PyTorch version. One of them says from
which length on sparse attention wins: `nabla bench --crossover` measures it.
"""

import os
import re
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from nabla_attn.record import RunRecord, describe_device

VARIABLE = "NABLA_ATTN_CACHE"
CROSSOVER = "bench-crossover"
"""The kind of the records of `nabla bench --crossover`."""


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16.

    A CPU without them takes many times as long for a product in bfloat16 as for one in float32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    if device.type == "cpu":
        features = torch.cpu.get_capabilities()
        return any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def cache_folder() -> Path:
    """`$NABLA_ATTN_CACHE`, else `nabla-attn` in `$XDG_CACHE_HOME` or in `~/.cache`."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nabla-attn"


def machine_file(kind: str, device: torch.device) -> Path:
    """Return the file of one kind of measurement.

    It is `KIND_DEVICE_torch-VERSION.json` in `cache_folder`.

    A CPU's name has its number of threads, because measurements depend on it.
    """
    return cache_folder() / f"{kind}_{device_slug(device)}_torch-{torch.__version__}.json"


def device_slug(device: torch.device) -> str:
    """Return a device's name in file names."""
    return re.sub(r"[^a-z0-9.]+", "-", describe_device(device).lower()).strip("-")


def crossover_file(device: torch.device) -> Path:
    """Return the path of this machine's record of `nabla bench --crossover`."""
    return machine_file("crossover", device)


def min_tokens(results: list[dict[str, Any]], *, density: float = 0.3) -> int | None:
    """Return the shortest length from which sparse wins at `density` or less; None if never."""
    lengths = sorted({point["tokens"] for point in results})
    for length in lengths:
        longer = [p for p in results if p["tokens"] >= length and p["density"] <= density]
        if longer and all(point["speed_up"] > 1 for point in longer):
            return int(length)
    return None


def load_min_tokens(path: str | Path) -> int:
    """Return `min_tokens` of a record; if sparse never won, one more than the longest length.

    Raises:
        ValueError: The file does not exist or is not a record of `nabla bench --crossover`.
    """
    try:
        record = RunRecord.load(path)
    except OSError as error:
        raise ValueError(f"crossover record {path}: {error.strerror}.") from error
    try:
        if record.kind != CROSSOVER:
            raise ValueError(f"its kind is {record.kind!r}")
        results = record.numbers["results"]
        return min_tokens(results) or max(int(point["tokens"]) for point in results) + 1
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a record of `nabla bench --crossover` ({error}). Measure again."
        ) from error


def min_tokens_here(device: torch.device, default: int) -> int:
    """Return `load_min_tokens` of this machine's record; without one, warn and use `default`."""
    path = crossover_file(device)
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        # It does not exist, or the home is another user's, as in containers that keep root's.
        _warn_once(path, default)
        return default
    return _load_once(path, changed)


@lru_cache(maxsize=32)
def _warn_once(path: Path, default: int) -> None:
    warnings.warn(
        f"min_tokens='auto' needs a record of this machine, got none at {path}; using {default}. "
        "Measure once with `nabla bench --crossover`.",
        stacklevel=3,
    )


@lru_cache(maxsize=32)
def _load_once(path: Path, changed: int) -> int:
    return load_min_tokens(path)
