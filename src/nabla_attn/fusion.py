"""Chains of small tensor operations, fused by torch.compile where that pays for its compilation."""

import shutil
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils._triton import has_triton

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
        function: what to compile.
        num_elements: its work.
        device: where it runs.
        dynamic: as in `compiled`.
    """
    is_small = num_elements < MIN_ELEMENTS
    # What watches every operation, such as a count of FLOPs, must see them one by one.
    is_watched = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
    if is_small or is_watched or why_not_compile(device) is not None:
        return function
    return compiled(function, dynamic)


@lru_cache(maxsize=1)
def _has_cpp_compiler() -> bool:
    return any(shutil.which(name) for name in ("g++", "clang++"))


def why_not_compile(device: torch.device) -> str | None:
    """The reason why torch.compile cannot make kernels for `device`, or None."""
    if torch._dynamo.config.disable:
        return "torch.compile is switched off (TORCHDYNAMO_DISABLE)"
    if device.type == "cuda":
        return None if has_triton() else "Triton is not installed"
    if device.type == "cpu":
        return None if _has_cpp_compiler() else "no C++ compiler (g++ or clang++) is on PATH"
    return f"there is no compiled kernel for {device.type}"


@lru_cache(maxsize=32)
def compiled(
    function: Callable[..., Any], dynamic: bool | None = None, max_autotune: bool = False
) -> Callable[..., Any]:
    """`function` under torch.compile, one instance per process, without graph breaks.

    Args:
        function: what to compile.
        dynamic: False compiles anew for each size, True once for all but 1; None makes sizes that
            change variable.
        max_autotune: try more kernels than the compiler's first choice.
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
