"""Backends turn q, k, v in block order, a BlockMap and its tail into attention output.

A backend never decides which blocks. `auto` follows `AUTO_RULE`; any other name runs or raises.
"""

import warnings
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

OWN = ("reference", "gather", "flex")
OTHERS = ("fastvideo", "flashinfer")
"""Kernels of other packages, which "auto" never takes."""
NAMES = (*OWN, *OTHERS)
FALLBACK = "gather"
"""The backend that runs on every device, whatever the blocks."""
AUTO_RULE = (
    "flex on CUDA where a compiler is present and its kernels take the blocks, gather everywhere "
    "else"
)


def resolve(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_tokens: int | None = None,
    tail: str | None = None,
    is_text_padded: bool = False,
) -> Callable[..., Tensor]:
    """The `attend(q, k, v, block_map, *, scale, tail)` function of a backend, for these inputs.

    Args:
        name: "auto" or one of `NAMES`.
        q: Queries [batch, heads, tokens, dim].
        k: Keys, like q.
        v: Values, like q.
        block_tokens: Tokens of a block; None leaves open whether the backend takes the blocks.
        tail: How dropped blocks are estimated, as in `SparseConfig`.
        is_text_padded: Whether some text is padding.

    Raises:
        ValueError: Unknown name, or q, k, v that no backend takes.
        RuntimeError: The backend cannot run on these inputs; says why and what can.
    """
    check_inputs(q=q, k=k, v=v)
    if name not in ("auto", *NAMES):
        raise ValueError(f"unknown backend {name!r}; expected one of {('auto', *NAMES)}.")
    if name == "auto" and q.device.type != "cuda":
        name = FALLBACK
    reason = why_not(
        "flex" if name == "auto" else name,
        q.device,
        needs_grad=torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)),
        dtype=q.dtype,
        head_dim=q.shape[-1],
        block_tokens=block_tokens,
        tail=tail,
        is_text_padded=is_text_padded,
    )
    if name == "auto":
        name = "flex" if reason is None else FALLBACK
        if reason is not None:
            _warn_of_fallback(reason)
    elif reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run: {reason}. Use backend={FALLBACK!r}.")
    return _backend(name).attend


def _backend(name: str) -> Any:
    """What has the `attend` of a backend, and its `why_not` where it cannot run everywhere."""
    if name in OTHERS:
        return import_module("nabla_attn.backends.block64").KERNELS[name]
    return import_module(f"nabla_attn.backends.{name}")


@lru_cache(maxsize=32)
def _warn_of_fallback(reason: str) -> None:
    warnings.warn(
        f"backend 'auto' runs {FALLBACK!r}, which is slower on a GPU: flex cannot run, because "
        f"{reason}.",
        stacklevel=4,
    )


def why_not(
    name: str,
    device: torch.device,
    *,
    needs_grad: bool = False,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
    block_tokens: int | None = None,
    tail: str | None = None,
    is_text_padded: bool = False,
) -> str | None:
    """The reason why a backend cannot run, or None when it can.

    Args:
        name: One of `NAMES`.
        device: Where it would run.
        needs_grad: Gradients are wanted.
        dtype: Dtype of the inputs; None leaves it open, like the rest.
        head_dim: Dim of a head.
        block_tokens: Tokens of a block.
        tail: How dropped blocks are estimated.
        is_text_padded: Whether some text is padding.
    """
    if name not in ("flex", *OTHERS):
        return None
    more = {"is_text_padded": is_text_padded} if name in OTHERS else {}
    reason: str | None = _backend(name).why_not(
        device,
        needs_grad=needs_grad,
        dtype=dtype,
        head_dim=head_dim,
        block_tokens=block_tokens,
        tail=tail,
        **more,
    )
    return reason


def available(device: torch.device | str = "cpu") -> dict[str, str | None]:
    """Every backend and the reason why it cannot run on `device`, None when it can."""
    return {name: why_not(name, torch.device(device)) for name in NAMES}


def check_inputs(**inputs: Tensor) -> None:
    """Raise ValueError unless the named tensors share one shape of four axes and one dtype."""
    names, first = ", ".join(inputs), next(iter(inputs.values()))
    if first.dim() != 4 or any(x.shape != first.shape for x in inputs.values()):
        shapes = [tuple(x.shape) for x in inputs.values()]
        raise ValueError(f"{names} must share one shape [batch, heads, tokens, dim]: got {shapes}.")
    dtypes = [x.dtype for x in inputs.values()]
    if len(set(dtypes)) > 1 or not first.is_floating_point():
        raise ValueError(f"{names} must share one floating dtype: got {dtypes}. Cast them first.")
