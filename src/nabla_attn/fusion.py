"""Chains of small tensor operations, fused by torch.compile where that pays for its compilation."""

import json
import os
import shutil
import subprocess
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._triton import has_triton

from nabla_attn.errors import Note, first_line
from nabla_attn.files import parse_json, write_text
from nabla_attn.machine import machine_file

# Below this many elements a chain takes well under a millisecond, and compiling takes seconds.
MIN_ELEMENTS = 2**21
# Seconds of compiling a function, where that was not measured; from which on a wait is named.
TYPICAL_SECONDS, LONG_SECONDS = 10.0, 5.0
# What compiled maps save on a CPU for each pair of blocks, against compiling two functions.
SAVED_SECONDS_PER_PAIR = 1.5e-7
MAX_VARIANTS = 128

_fuses: ContextVar[bool] = ContextVar("fuses", default=True)


@contextmanager
def fusing_for(num_pairs: int) -> Iterator[None]:
    """Inside the block, maps on a CPU are compiled only if that pays within the block.

    Compiled sums round in another order, so the choice follows from what is asked for, and never
    from what was measured or cached: the same request gives the same video.

    Args:
        num_pairs: Pairs of blocks that are scored inside the block, over all heads and calls.
    """
    token = _fuses.set(num_pairs * SAVED_SECONDS_PER_PAIR >= 2 * TYPICAL_SECONDS)
    try:
        yield
    finally:
        _fuses.reset(token)


def fused(
    function: Callable[..., Any],
    num_elements: int,
    device: torch.device,
    dynamic: bool | None = None,
) -> Callable[..., Any]:
    """`function` compiled if its work is large and a compiler is here, else `function` itself.

    Args:
        function: What to compile.
        num_elements: Its work.
        device: Where it runs.
        dynamic: As in `compiled`.
    """
    is_small = num_elements < MIN_ELEMENTS
    is_left_out = device.type == "cpu" and not _fuses.get()
    if is_small or is_left_out or _is_watched():
        return function
    if why_not_compile(device) is not None:
        fault = _fault_of_compiler(device)
        if fault is not None:
            _warn_of(fault)
        return function
    run = compiled(function, dynamic)

    def try_compiled(*args: Any) -> Any:
        try:
            return run(*args)
        except Exception as error:
            if not _is_of_compiler(error):
                raise
            _FAILED[device.type] = f"compiling failed: {first_line(error)}"
            _warn_of(_FAILED[device.type])
            return function(*args)

    return try_compiled


def _is_watched() -> bool:
    """Whether something, such as a count of FLOPs, must see the operations one by one."""
    # Not `is_in_torch_dispatch_mode`, one flag for all threads, which may stay set for ever where
    # the modes of two threads overlap.
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None


# Why compiling failed, by type of device: it is tried once.
_FAILED: dict[str, str] = {}


def _is_of_compiler(error: Exception) -> bool:
    from torch._dynamo.exc import TorchDynamoException  # seconds to import

    return isinstance(error, TorchDynamoException | OSError)


@lru_cache(maxsize=8)
def _warn_of(fault: str) -> None:
    warnings.warn(f"maps are built uncompiled, which is slower: {fault}.", stacklevel=4)


@lru_cache(maxsize=1)
def _why_no_cache() -> str | None:
    """The reason why the compiler's cache, without which torch cannot start it, is not there."""
    # Not asked of torch, which makes the folder when its compiler is imported and fails with it.
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"torch.compile's cache cannot be written ({error})"


def _cpp_compiler() -> str | None:
    return next(filter(None, map(shutil.which, ("g++", "clang++"))), None)


@lru_cache(maxsize=1)
def _why_not_build() -> str | None:
    """The reason why the C++ compiler cannot build a file that includes Python's header."""
    compiler = _cpp_compiler()
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <Python.h>\n")
        include = sysconfig.get_paths()["include"]
        command = [compiler, "-fsyntax-only", f"-I{include}", str(source)]
        built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode == 0:
        return None
    lines = [line for line in built.stderr.splitlines() if "error" in line] or ["no reason given"]
    return f"{compiler} cannot build: {lines[0].split('error: ')[-1]}"


def _fault_of_compiler(device: torch.device) -> str | None:
    """The reason why a compiler that is here does not work, or None."""
    found = _FAILED.get(device.type) or _why_no_cache()
    return found or (_why_not_build() if device.type == "cpu" else None)


def why_not_compile(device: torch.device) -> str | None:
    """The reason why torch.compile cannot make kernels for `device`, or None."""
    if device.type not in ("cpu", "cuda"):
        return f"there is no compiled kernel for {device.type}"
    if device.type == "cpu" and _cpp_compiler() is None:
        return "no C++ compiler (g++ or clang++) is on PATH"
    fault = _fault_of_compiler(device)
    if fault is not None:
        return fault
    # Looked at last: torch's compiler cannot be imported where its cache cannot be written.
    if torch._dynamo.config.disable:
        return "torch.compile is switched off (TORCHDYNAMO_DISABLE)"
    if device.type == "cuda" and not has_triton():
        return "Triton is not installed"
    return None


@lru_cache(maxsize=32)
def compiled(
    function: Callable[..., Any], dynamic: bool | None = None, max_autotune: bool = False
) -> Callable[..., Any]:
    """`function` under torch.compile, one instance per process, without graph breaks.

    Args:
        function: What to compile.
        dynamic: False compiles anew for each size, True once for all but 1; None makes sizes that
            change variable.
        max_autotune: Try more kernels than the compiler's first choice.
    """
    options: dict[str, Any] | None = {"max_autotune": True} if max_autotune else None
    run = torch.compile(function, fullgraph=True, dynamic=dynamic, options=options)
    first = [function.__name__.strip("_")]

    def call(*args: Any) -> Any:
        if first:
            device = next(arg.device for arg in args if isinstance(arg, Tensor))
            with _timed(first.pop(), device):
                return call(*args)
        # A long-lived process meets more dtypes, head sizes and layouts than the default of 8.
        # Sizes that happen to be equal are not the same size.
        with (
            torch._dynamo.config.patch(recompile_limit=MAX_VARIANTS),
            torch.fx.experimental._config.patch(use_duck_shape=False),  # type: ignore[attr-defined]
        ):
            return run(*args)

    return call


@contextmanager
def _timed(name: str, device: torch.device) -> Iterator[None]:
    """Say that a first call will compile, where that takes long, and keep how long it took."""
    path = machine_file("compile", device)
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir()
    known = _compile_seconds(path)
    is_cached = cache in known.get(name, {})
    seconds = max(known.get(name, {}).values(), default=TYPICAL_SECONDS)
    if not is_cached and seconds >= LONG_SECONDS:
        warnings.warn(f"compiling {name}, about {seconds:.0f} s, once", Note, stacklevel=5)
    began = time.perf_counter()
    yield
    if not is_cached:
        known.setdefault(name, {})[cache] = round(time.perf_counter() - began, 1)
        # Others may have compiled meanwhile, or the home may be another user's: it is an estimate.
        with suppress(OSError):
            write_text(path, json.dumps(known, indent=2) + "\n")


def _compile_seconds(path: Path) -> dict[str, dict[str, float]]:
    """Function -> folder of the compiler's cache -> seconds that compiling took."""
    try:
        known = parse_json(path.read_text(encoding="utf-8"))
        return {name: {str(x): float(s) for x, s in found.items()} for name, found in known.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def take_any_length(*tensors: Tensor, axes: Iterable[int] = (0,)) -> None:
    """Let what is compiled for these tensors serve any length but 1 of some axes."""
    for tensor in tensors:
        for axis in axes:
            torch._dynamo.maybe_mark_dynamic(tensor, axis)
