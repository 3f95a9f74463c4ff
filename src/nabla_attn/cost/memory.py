"""The memory of a computation before it is done: traced without data, or by a formula."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU_CHANNELS = 16
"""Channels that oneDNN's convolutions on a CPU take at once."""
UNFOLDED = 20480
"""Numbers of an input beside its last axis, up to which torch does not take oneDNN."""

RESERVE = 2**29
"""Bytes of a CPU that are left to libraries: their code, what they compile, and their caches."""
_is_forced: ContextVar[bool] = ContextVar("is_forced", default=False)


@contextmanager
def force_memory(is_forced: bool = True) -> Iterator[None]:
    """Start work in a block even where it needs more memory than is free.

    Args:
        is_forced: Whether to do so; False leaves everything as it is.
    """
    token = _is_forced.set(is_forced or _is_forced.get())
    try:
        yield
    finally:
        _is_forced.reset(token)


def memory_is_forced() -> bool:
    """Whether work starts even where it needs more memory than is free."""
    return _is_forced.get()


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of tensors, arrays and scratch memory that a run holds at once.

    Attributes:
        weights: Bytes of the weights on the device that are held all the time.
        stages: Bytes that each stage holds beside them; one stage runs at a time.
    """

    weights: int
    stages: Mapping[str, int]

    @property
    def largest(self) -> str:
        """The stage that holds the most."""
        return max(self.stages, key=lambda name: self.stages[name])

    @property
    def peak(self) -> int:
        """The most that is held at once: the weights and the largest stage."""
        return self.weights + self.stages[self.largest]

    def __str__(self) -> str:
        return (
            f"about {in_gib(self.peak)} at most, while {self.largest}: "
            f"{in_gib(self.weights)} of weights, {in_gib(self.stages[self.largest])} for the stage"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: bytes."""
        return {"weights": self.weights, "stages": dict(self.stages), "peak": self.peak}

    def check(self, device: torch.device, what: str, remedy: str) -> None:
        """Refuse what cannot fit, instead of being killed by the system in the middle.

        Within `force_memory` nothing is refused.

        Args:
            device: The device that holds it.
            what: What takes the memory.
            remedy: What to do instead.

        Raises:
            ValueError: It takes more than what is free; the numbers are named.
        """
        free = free_bytes(device)
        reserve = RESERVE if device.type == "cpu" else 0
        if self.peak + reserve > free and not memory_is_forced():
            raise ValueError(
                f"{what} takes {self}, and {in_gib(free)} are free on the {device.type}. {remedy}, "
                "or pass --force to try (in Python, enter force_memory())."
            )


def traced_peak(build: Callable[[], Callable[[], Any]], *, is_cpu: bool) -> int:
    """The most bytes that a computation holds at once beside its inputs and weights.

    Args:
        build: A function that makes the inputs and weights, and gives the computation. Both run on
            tensors without data.
        is_cpu: Whether convolutions take the scratch memory of oneDNN on a CPU.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        run = build()
        with torch.no_grad(), _LiveBytes(is_cpu=is_cpu) as live:
            kept = run()
    del kept
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """The bytes of the storages that are made and alive at once while it is entered."""

    def __init__(self, *, is_cpu: bool) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._is_cpu = is_cpu
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        held = {leaf.untyped_storage()._cdata for leaf in tree_leaves(args) if _is_tensor(leaf)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            # What shares the storage of an input is a view.
            if _is_tensor(leaf) and leaf.untyped_storage()._cdata not in held:
                self._add(leaf)
        scratch = _scratch(func, args, result) if self._is_cpu else 0
        self.peak = max(self.peak, self.now + scratch)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _scratch(func: Any, args: Any, result: Any) -> int:
    """Bytes that a convolution on a CPU takes beside input and output, measured with torch 2.13.

    oneDNN copies to channels in groups and back; what torch thinks too small for it is unfolded.
    """
    if func._schema.name != "aten::convolution":
        return 0
    x, weight = args[0], args[1]
    taps = weight[0, 0].numel()
    if taps == 1:
        return 0
    numbers = result[:, 0].numel()
    if x.shape[0] == 1 and x[0, ..., 0].numel() <= UNFOLDED and x.ndim == 5:
        return int(taps * x.shape[1] * numbers * x.itemsize)
    group = CPU_CHANNELS
    read = 0 if x.shape[1] < group else -(-x.shape[1] // group) * group * x[:, 0].numel()
    written = -(-weight.shape[0] // group) * group * numbers
    return int(max(read + written - result.numel(), written) * x.itemsize)


def activation_bytes(
    tokens: int, width: int, ffn: int, heads: int, item: int = 2, sparse: int = 0
) -> float:
    """Peak of a transformer's forward beside its weights, without gradients.

    Either the attention half of a block is the largest (float32 norms, q, k, v and tokens), or the
    feed-forward half (two copies of its inner layer).

    Args:
        tokens: Number of tokens, of all samples of the batch.
        width: Width of the transformer.
        ffn: Width of its feed-forward layer.
        heads: Number of heads.
        item: Bytes of a number.
        sparse: Bytes that sparse attention adds to its half.
    """
    attention = tokens * width * (12.4 + 4.45 * item) + sparse
    feed_forward = tokens * width * (4 * item + 2 * item * ffn / width)
    return max(attention, feed_forward) + tokens * width * 8 / heads


def sparse_bytes(tokens: int, width: int, heads: int, block_tokens: int, item: int = 2) -> int:
    """What sparse attention adds: q, k, v and output in block order, a mask and two index tables.

    Args:
        tokens: Number of tokens, of all samples of the batch.
        width: Width of the transformer.
        heads: Number of heads, of all samples of the batch.
        block_tokens: Tokens of a block.
        item: Bytes of a number.
    """
    return 4 * tokens * width * item + 9 * heads * (-(-tokens // block_tokens)) ** 2


def free_bytes(device: torch.device) -> int:
    """Bytes that are free on a device; on the CPU at most what the process's cgroup allows.

    Without psutil, which attention alone does not need, only the latter is known.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = _group_limits()
    try:
        import psutil
    except ModuleNotFoundError:
        return min(limits)
    return min(int(psutil.virtual_memory().available), *limits)


def _group_limits(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What is left under the memory limits of the process's control group, version 2 and 1."""
    names = (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    )
    left = [2**63]
    for limit, used in names:
        try:
            left.append(int((root / limit).read_text()) - int((root / used).read_text()))
        except (OSError, ValueError):  # no such file, or the text "max"
            continue
    return left


def in_gib(count: float) -> str:
    """Bytes such as `1.5 GiB`, small ones such as `120 MiB`."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"
