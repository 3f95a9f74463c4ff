"""How FlexAttention runs: tile height and kernel options, chosen from measured tables.

An override wins, then what `nabla_attn.bench.tune` measured on this machine, then the package's
table, then a default that runs everywhere.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import FlexKernelOptions

from nabla_attn.files import parse_json
from nabla_attn.machine import machine_file

TABLE = Path(__file__).with_suffix(".json")
FLASH_BLOCK = 128
"""Tokens of the key blocks that flash-attn's kernels take."""
FLASH_QUERIES = {9: 128, 10: 256}
"""Queries of their tiles, by the major number of the architectures that keep to a block map."""
LEAST_TILE = 16
"""Rows of the smallest product that Triton has."""


@dataclass(frozen=True)
class FlexOptions:
    """One way to run FlexAttention.

    Attributes:
        tile_rows: Query blocks in one tile of the kernel; the result does not depend on it.
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
        ValueError: A table cannot be read, or its options do not fit the blocks.
    """
    options = _override.get()
    if options is None:
        key = key_of(q, block_tokens, needs_backward=needs_backward)
        rows = [*table_rows(tuned_file(q.device)), *table_rows(TABLE)]
        found = next((row for row in rows if all(row.get(k) == v for k, v in key.items())), None)
        if found is not None:
            options = FlexOptions(found["tile_rows"], dict(found["kernel_options"]))
    return _fitted(options or FlexOptions(), q, block_tokens)


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


def needs_autotuning(q: Tensor, block_tokens: int) -> bool:
    """Whether the backward has no kernel for these blocks unless the compiler tries several.

    torch has one default backward for an architecture and head dim, whose largest tile may not
    divide the blocks, and no kernel option replaces it; autotuning tries tiles of 32 and 64.

    Source: torch 2.13, _inductor/template_heuristics/triton.py, `get_flex_attn_bwd_configs`.
    """
    if q.device.type != "cuda" or q.dtype == torch.float32:
        return False
    major, head_dim = torch.cuda.get_device_capability(q.device)[0], q.shape[-1]
    if major in (9, 10):
        is_tall = head_dim <= 128 and (major == 10 or head_dim >= 64)
    else:
        is_tall = head_dim < 64
    return block_tokens % (128 if is_tall else 64) != 0


def why_not_tiles(
    *,
    dtype: torch.dtype | None,
    head_dim: int | None,
    block_tokens: int | None,
    needs_backward: bool,
) -> str | None:
    """The reason why Triton has no kernel of FlexAttention for such inputs, or None.

    Args:
        dtype: Dtype of the inputs; None leaves it open, like the rest.
        head_dim: Dim of a head.
        block_tokens: Tokens of a block.
        needs_backward: Gradients are wanted.
    """
    if dtype == torch.float64:
        return "its kernels on CUDA take no float64"
    if head_dim is not None and head_dim < LEAST_TILE:
        return f"its kernels on CUDA need heads of at least {LEAST_TILE} dims: got {head_dim}"
    if block_tokens is None:
        return None
    has_small_backward = dtype == torch.float32
    least = 2 * LEAST_TILE if needs_backward and not has_small_backward else LEAST_TILE
    tile = _power_in(block_tokens)
    if tile >= least:
        return None
    direction = "backward on CUDA" if needs_backward else "kernels on CUDA"
    return (
        f"its {direction} needs blocks of a multiple of {least} tokens: got {block_tokens} tokens, "
        f"which divide into tiles of {tile}"
    )


def why_not_flash(device: torch.device, block_tokens: int, tile_rows: int = 1) -> str | None:
    """The reason why flash-attn's kernels cannot run FlexAttention here, or None.

    Args:
        device: Where they would run.
        block_tokens: Tokens of a block.
        tile_rows: Query blocks of one tile.
    """
    if device.type != "cuda":
        return "flash-attn's kernels need CUDA"
    if "BACKEND" not in FlexKernelOptions.__annotations__:
        return f"torch {torch.__version__} has no BACKEND option"
    if find_spec("flash_attn") is None or find_spec("flash_attn.cute") is None:
        return "flash-attn 4 (flash_attn.cute) is not installed"
    major = torch.cuda.get_device_capability(device)[0]
    if major not in FLASH_QUERIES:
        # Reported for sm_80: it ignores the map and attends everything.
        return f"it keeps to a block map on sm_90 and sm_100 only: got {architecture(device)}"
    if block_tokens % FLASH_BLOCK:
        return f"it needs key blocks of {FLASH_BLOCK} tokens: got {block_tokens}"
    height = tile_rows * block_tokens
    if height % FLASH_QUERIES[major]:
        return (
            f"on {architecture(device)} it needs tiles of {FLASH_QUERIES[major]} queries: got "
            f"{height}, {tile_rows} query blocks of {block_tokens} tokens"
        )
    return None


def _fitted(options: FlexOptions, q: Tensor, block_tokens: int) -> FlexOptions:
    """The options with what the blocks and the architecture need, where they do not say it."""
    if options.is_flash:
        reason = why_not_flash(q.device, block_tokens, options.tile_rows)
        if reason is not None:
            raise ValueError(f"BACKEND='FLASH' cannot run: {reason}. Choose other options.")
        return options
    height, kernel = options.tile_rows * block_tokens, dict(options.kernel)
    if q.device.type == "cuda":
        kernel = _default_kernel(q, block_tokens, options.tile_rows) | kernel
        # Said outright, since torch asks it of known lengths only, and not of the backward's tiles.
        kernel.setdefault("IS_DIVISIBLE", q.shape[-2] % height == 0)
    for name, size in (("BLOCK_M", height), ("BLOCK_N", block_tokens)):
        if size % kernel.get(name, size):
            raise ValueError(
                f"{name}={kernel[name]} does not divide {size}: a tile has {options.tile_rows} "
                f"query blocks of {block_tokens} tokens. Choose a divisor."
            )
    return FlexOptions(options.tile_rows, kernel)


def _default_kernel(q: Tensor, block_tokens: int, tile_rows: int) -> dict[str, Any]:
    """Tiles that divide the blocks and fit in registers and shared memory, and their warps."""
    head_dim, is_single = q.shape[-1], q.dtype == torch.float32
    # Products in fp32 run without tensor cores: both tiles and their result stay in registers.
    most = 32 if is_single else 128
    rows = _power_in(tile_rows * block_tokens, most)
    columns = _power_in(block_tokens, min(most, 64))
    # A warp of a tensor core's product works on 16 rows.
    warps = 4 if is_single else min(max(rows // 16, 1), 8)
    kernel: dict[str, Any] = {"BLOCK_M": rows, "BLOCK_N": columns, "fwd_num_warps": warps}
    if rows > 64:
        has_room = partial(fits, q.device, rows, columns, head_dim=head_dim)
        kernel["fwd_num_stages"] = next((stages for stages in (3, 2) if has_room(stages)), 1)
    # A short sequence would be handed to a kernel for decoding, which has other tiles.
    kernel["FORCE_USE_FLEX_ATTENTION"] = True
    return kernel


def fits(device: torch.device, rows: int, columns: int, stages: int, *, head_dim: int) -> bool:
    """Whether a tile of queries, and keys and values of each stage, fit in shared memory.

    Numbers have two bytes.

    Args:
        device: A GPU; whatever is asked fits on one that is not there.
        rows: Queries of a tile, of which 128 are taken at once.
        columns: Keys of a tile, of which 64 are taken at once.
        stages: Tiles of keys and values that are loaded ahead.
        head_dim: Dim of a head.
    """
    if not torch.cuda.is_available():
        return True
    properties: Any = torch.cuda.get_device_properties(device)
    has = properties.shared_memory_per_block_optin
    tokens = min(rows, 128) + 2 * stages * min(columns, 64)
    # Heads are filled up to a power of two.
    return tokens * 2 ** (head_dim - 1).bit_length() * 2 <= has


def has_tma(device: torch.device) -> bool:
    """Whether a GPU copies whole tiles by itself (tensor memory accelerator, from sm_90 on)."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] >= 9


def _power_in(tokens: int, most: int = 128) -> int:
    """The largest power of two that divides a number of tokens, at most `most`."""
    return min(tokens & -tokens, most)


@lru_cache(maxsize=8)
def table_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a table, of which the first that fits a call counts; none without a file.

    Raises:
        ValueError: The file is no table.
    """
    try:
        rows = parse_json(path.read_text(encoding="utf-8"))["rows"]
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
