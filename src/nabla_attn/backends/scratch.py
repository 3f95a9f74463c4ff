"""Memory of one thread, used again from piece to piece: fresh megabytes cost page faults."""

from math import prod

import torch
from torch import Tensor


class Scratch:
    """Named buffers that grow to the largest tensor asked of them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, valid until `name` is taken again."""
        size, key = prod(shape), (name, dtype)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            self._buffers[key] = buffer = torch.empty(size, dtype=dtype, device=self._device)
        return buffer[:size].view(shape)
