"""Backends turn q, k, v in block order and a BlockMap into attention output.

A backend never decides which blocks. `auto` follows `AUTO_RULE`; any other name runs or raises.
"""

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

NAMES = ("reference", "gather", "flex")
AUTO_RULE = "flex on CUDA where a compiler is present, gather everywhere else"


def resolve(name: str, q: Tensor, k: Tensor, v: Tensor) -> Callable[..., Tensor]:
    """The `attend(q, k, v, block_map, *, scale)` function of a backend, for these inputs.

    Raises:
        ValueError: unknown name, or q, k, v that no backend takes.
        RuntimeError: the backend cannot run on these inputs; says why and what can.
    """
    check_inputs(q=q, k=k, v=v)
    if name == "auto":
        is_flex = q.device.type == "cuda" and why_not("flex", q.device) is None
        name = "flex" if is_flex else "gather"
    elif name not in NAMES:
        raise ValueError(f"unknown backend {name!r}; expected one of {('auto', *NAMES)}.")
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    reason = why_not(name, q.device, needs_grad=needs_grad)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run: {reason}. Use backend='gather'.")
    return import_module(f"nabla_attn.backends.{name}").attend


def why_not(name: str, device: torch.device, *, needs_grad: bool = False) -> str | None:
    """The reason why a backend cannot run on a device, or None when it can."""
    if name != "flex":
        return None
    from nabla_attn.backends import flex

    return flex.why_not(device, needs_grad=needs_grad)


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
