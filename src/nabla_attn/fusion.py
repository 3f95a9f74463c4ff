"""Chains of small tensor operations, fused by torch.compile where that pays for its compilation."""

import os
import shutil
import subprocess
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils._triton import has_triton

from nabla_attn.errors import first_line

# Below this many elements a chain takes well under a millisecond, and compiling takes seconds.
MIN_ELEMENTS = 2**21
MAX_VARIANTS = 128


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
    # What watches every operation, such as a count of FLOPs, must see them one by one.
    is_watched = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
    if is_small or is_watched:
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

    def call(*args: Any) -> Any:
        # A long-lived process meets more dtypes, head sizes and layouts than the default of 8.
        # Sizes that happen to be equal are not the same size.
        with (
            torch._dynamo.config.patch(recompile_limit=MAX_VARIANTS),
            torch.fx.experimental._config.patch(use_duck_shape=False),  # type: ignore[attr-defined]
        ):
            return run(*args)

    return call


def take_any_length(*tensors: Tensor, axes: Iterable[int] = (0,)) -> None:
    """Let what is compiled for these tensors serve any length but 1 of some axes."""
    for tensor in tensors:
        for axis in axes:
            torch._dynamo.maybe_mark_dynamic(tensor, axis)
