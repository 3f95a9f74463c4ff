"""Fake tensors that remember which operations made the host wait, what moved, and what was held."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
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


# Of these the schema does not say that nothing moves.
UNMOVED = {aten._unsafe_view.default, torch.ops.prim.device.default}


class WatchedMode(FakeTensorMode):
    """Fake tensors whose operations are kept while `watch` is on and nothing is traced."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._seen: list[dict[str, Any]] | None = None
        self._held: dict[StorageWeakRef, int] = {}
        self._begun_with = 0

    @contextmanager
    def watch(self) -> Iterator[list[dict[str, Any]]]:
        """What runs on the device inside the block, one entry an operation or a kernel."""
        self._seen, before = [], self._seen
        self._begun_with = self._count_held()
        try:
            yield self._seen
        finally:
            self._seen = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if TracingContext.try_get() is None:
            for x in _tensors(result):
                if x.device.type == "cuda":
                    storage = x.untyped_storage()
                    self._held.setdefault(StorageWeakRef(storage), storage.nbytes())
            if self._seen is not None and func not in UNMOVED:
                self._keep(func, args, kwargs or {}, result)
        return result

    def keep_kernel(self, name: str, read: list[Tensor], written: list[Tensor]) -> None:
        """Remember a kernel of a compiled graph: it reads and writes each tensor once."""
        if self._seen is not None:
            entry = {"name": name, "where": "compiled", "waits": None}
            self._seen.append(entry | self._moved(_bytes_of(read), _bytes_of(written)))

    def _keep(self, func: Any, args: tuple[Any, ...], kwargs: Any, result: Any) -> None:
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        devices = {x.device.type for x in inputs}, {x.device.type for x in outputs}
        is_view = any(x.alias_info and not x.alias_info.is_write for x in func._schema.returns)
        if "cuda" not in devices[0] | devices[1] or is_view:
            return
        read, written = _bytes_of(inputs), _bytes_of(outputs)
        if "out" in kwargs:
            read -= written
        is_new = "empty" in str(func)
        if func is aten.copy_.default:
            read = written = args[1].numel() * args[1].itemsize
        elif func is aten.index_fill_.int_Scalar:
            read, written = 0, written * args[2].numel() // args[0].shape[args[1]]
        entry = {"name": str(func), "where": _where(), "waits": _why_it_waits(func, args, devices)}
        if is_new:
            entry["allocated"], read, written = written, 0, 0
        self._seen.append(entry | self._moved(read, written))

    def _moved(self, read: int, written: int) -> dict[str, int]:
        return {"read": read, "written": written, "held": self._count_held() - self._begun_with}

    def _count_held(self) -> int:
        self._held = {ref: size for ref, size in self._held.items() if not ref.expired()}
        return sum(self._held.values())


def _bytes_of(tensors: list[Tensor]) -> int:
    return sum(x.numel() * x.itemsize for x in tensors)


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
