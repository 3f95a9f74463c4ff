"""Bytes of tensors alive at once while a function runs, workspace of kernels left out."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts storages made under it until they are freed."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = set()
        self.given = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self.seen:
                self.given[storage._cdata] = storage  # held, so that its address is not used again
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            self._count(storage)
        return result

    def _count(self, storage):
        key = storage._cdata
        if key in self.seen or key in self.given:
            return
        self.seen.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key, size):
        self.seen.discard(key)
        self.now -= size


def _storages(tree):
    return [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def measure_peak(function):
    """Peak bytes of what ``function`` makes, without gradients."""
    with torch.no_grad(), LiveBytes() as live:
        result = function()
    del result
    return live.peak
