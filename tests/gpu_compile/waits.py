"""Fake tensors that remember which operations made the host wait, and what was allocated."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

aten = torch.ops.aten
# The host must know what the device computed before it can go on.
READS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
    aten.unique_dim.default,
}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class WatchedMode(FakeTensorMode):
    """Fake tensors whose operations are kept while `watch` is on and nothing is traced."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._seen: list[dict[str, Any]] | None = None

    @contextmanager
    def watch(self) -> Iterator[list[dict[str, Any]]]:
        """What runs on the device inside the block, one entry an operation."""
        self._seen, before = [], self._seen
        try:
            yield self._seen
        finally:
            self._seen = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self._seen is not None and TracingContext.try_get() is None:
            self._keep(func, args, kwargs or {}, result)
        return result

    def _keep(self, func: Any, args: tuple[Any, ...], kwargs: Any, result: Any) -> None:
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        devices = {x.device.type for x in inputs}, {x.device.type for x in outputs}
        if "cuda" not in devices[0] | devices[1]:
            return
        is_view = any(x.alias_info and not x.alias_info.is_write for x in func._schema.returns)
        is_new = not is_view and not any(x.alias_info for x in func._schema.returns)
        self._seen.append(
            {
                "name": str(func),
                "where": _where(),
                "waits": _why_it_waits(func, args, devices),
                "is_view": is_view,
                "read": 0 if is_view else sum(x.numel() * x.itemsize for x in inputs),
                "written": 0 if is_view else sum(x.numel() * x.itemsize for x in outputs),
                "allocated": sum(x.numel() * x.itemsize for x in outputs) if is_new else 0,
            }
        )


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _why_it_waits(
    func: Any, args: tuple[Any, ...], devices: tuple[set[str], set[str]]
) -> str | None:
    if func in READS:
        return f"the host reads the result of {func}"
    if func in INDEXED and any(x.dtype in (torch.bool, torch.uint8) for x in _tensors(args[1])):
        return f"{func} with a mask counts it on the host"
    if func is aten.copy_.default and len(devices[0]) > 1:
        return f"a copy between host and device by {func}"
    if func is aten._to_copy.default and devices[0] != devices[1]:
        return f"a copy from {devices[0]} to {devices[1]}"
    return None


def _where() -> str:
    for frame in reversed(traceback.extract_stack()):
        if "/src/nabla_attn/" in frame.filename:
            return f"{frame.filename.split('/src/')[1]}:{frame.lineno} {frame.line}"
    return "outside the package"
