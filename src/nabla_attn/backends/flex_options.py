"""How FlexAttention runs: tile height and kernel options, chosen from measured tables.

An override wins, then what `nabla_attn.bench.tune` measured on this machine, then the package's
table, then a default that runs everywhere.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import FlexKernelOptions

from nabla_attn.machine import machine_file

TABLE = Path(__file__).with_suffix(".json")
FLASH_BLOCK = 128  # tokens of the key blocks that FLASH and the largest kernels take


@dataclass(frozen=True)
class FlexOptions:
    """One way to run FlexAttention.

    Attributes:
        tile_rows: query blocks in one tile of the kernel; the result does not depend on it.
        kernel: `kernel_options` of torch's flex_attention, such as num_warps or BACKEND.

    Raises:
        ValueError: `tile_rows` is not a positive integer.
    """

    tile_rows: int = 1
    kernel: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if type(self.tile_rows) is not int or self.tile_rows < 1:
            raise ValueError(f"tile_rows must be a positive integer: got {self.tile_rows!r}.")

    @property
    def is_flash(self) -> bool:
        """Whether flash-attn's kernels run it."""
        return self.kernel.get("BACKEND") == "FLASH"


_override: ContextVar[FlexOptions | None] = ContextVar("flex_options", default=None)


@contextmanager
def flex_options(options: FlexOptions) -> Iterator[None]:
    """Run FlexAttention with these options inside the block, whatever the tables say."""
    token = _override.set(options)
    try:
        yield
    finally:
        _override.reset(token)


def choose_options(q: Tensor, block_tokens: int, *, needs_backward: bool) -> FlexOptions:
    """The options of a call.

    Raises:
        ValueError: a table cannot be read, or its options do not fit the blocks.
    """
    options = _override.get()
    if options is None:
        key = key_of(q, block_tokens, needs_backward=needs_backward)
        rows = [*table_rows(tuned_file(q.device)), *table_rows(TABLE)]
        found = next((row for row in rows if all(row.get(k) == v for k, v in key.items())), None)
        if found is not None:
            options = FlexOptions(found["tile_rows"], dict(found["kernel_options"]))
    return _fitted(options or FlexOptions(), q.device, block_tokens)


def key_of(q: Tensor, block_tokens: int, *, needs_backward: bool) -> dict[str, Any]:
    """What a row of a table is found by."""
    return {
        "architecture": architecture(q.device),
        "head_dim": q.shape[-1],
        "dtype": str(q.dtype).removeprefix("torch."),
        "block_tokens": block_tokens,
        "direction": "forward+backward" if needs_backward else "forward",
    }


def architecture(device: torch.device) -> str:
    """`sm_90` for an H100 or H200; the device's type where there is no CUDA."""
    if device.type != "cuda" or torch.version.hip:
        return device.type
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def tuned_file(device: torch.device) -> Path:
    """Where the table measured on this machine lies."""
    return machine_file("flex", device)


def needs_autotuning(device: torch.device, block_tokens: int) -> bool:
    """Whether the backward has no kernel for these blocks unless the compiler tries several.

    From Hopper on, torch (2.13, _inductor/template_heuristics/triton.py) has one default backward
    for heads of 64 to 128, in tiles of 128, and no kernel option replaces it; autotuning tries 64.
    """
    return device.type == "cuda" and block_tokens % FLASH_BLOCK != 0


def why_not_flash(device: torch.device, block_tokens: int) -> str | None:
    """The reason why flash-attn's kernels cannot run FlexAttention here, or None."""
    if device.type != "cuda":
        return "flash-attn's kernels need CUDA"
    if "BACKEND" not in FlexKernelOptions.__annotations__:
        return f"torch {torch.__version__} has no BACKEND option"
    if find_spec("flash_attn") is None or find_spec("flash_attn.cute") is None:
        return "flash-attn 4 (flash_attn.cute) is not installed"
    if block_tokens % FLASH_BLOCK:
        return f"it needs key blocks of {FLASH_BLOCK} tokens: got {block_tokens}"
    return None


def _fitted(options: FlexOptions, device: torch.device, block_tokens: int) -> FlexOptions:
    """The options with tile sizes that divide the blocks, which torch's own may not."""
    if options.is_flash:
        reason = why_not_flash(device, block_tokens)
        if reason is not None:
            raise ValueError(f"BACKEND='FLASH' cannot run: {reason}. Choose other options.")
        return options
    height, kernel = options.tile_rows * block_tokens, dict(options.kernel)
    if device.type == "cuda" and block_tokens % FLASH_BLOCK:
        # Triton's tiles are powers of two, and those of torch's choice are 128 at most.
        kernel = {"BLOCK_M": _power_in(height), "BLOCK_N": _power_in(block_tokens)} | kernel
    for name, size in (("BLOCK_M", height), ("BLOCK_N", block_tokens)):
        if size % kernel.get(name, size):
            raise ValueError(
                f"{name}={kernel[name]} does not divide {size}: a tile has {options.tile_rows} "
                f"query blocks of {block_tokens} tokens. Choose a divisor."
            )
    return FlexOptions(options.tile_rows, kernel)


def _power_in(tokens: int) -> int:
    """The largest power of two that divides a number of tokens, at most FLASH_BLOCK."""
    return min(tokens & -tokens, FLASH_BLOCK)


@lru_cache(maxsize=8)
def table_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a table, of which the first that fits a call counts; none without a file.

    Raises:
        ValueError: the file is no table.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        for row in rows:
            FlexOptions(row["tile_rows"], dict(row["kernel_options"]))
        return list(rows)
    except OSError:
        # No file, or one of another user's home: containers keep the home of root.
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no table of flex options ({error}). Delete it.") from error


def forget_tables() -> None:
    """Read the tables again at the next call."""
    table_rows.cache_clear()
