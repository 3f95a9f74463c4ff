"""Maps as bits: an eighth of the memory of bools, for maps that wait."""

import torch
from torch import Tensor

from nabla_attn.shapes import Bool


def pack_bits(mask: Bool[Tensor, "*rows columns"]) -> Tensor:
    """Eight entries of the last axis in one byte, the first in the lowest bit; uint8."""
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
    packed = padded[..., 0].to(torch.uint8)
    for bit in range(1, 8):
        packed |= padded[..., bit].to(torch.uint8) << bit
    return packed


def unpack_bits(packed: Tensor, num_columns: int) -> Bool[Tensor, "*rows columns"]:
    """Undo `pack_bits`."""
    bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> bits) & 1).bool().flatten(-2)[..., :num_columns]
