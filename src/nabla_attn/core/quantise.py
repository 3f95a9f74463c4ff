"""Numbers rounded as low-precision hardware would, in the type they came in, with gradients."""

import torch
from torch import Tensor

from nabla_attn.shapes import Bool, Float

E4M3_MAX = 448.0
"""The largest number of float8 with four bits of exponent and three of mantissa."""


def to_e4m3(
    x: Float[Tensor, "*shape"], scale: Float[Tensor, "*broadcast"]
) -> Float[Tensor, "*shape"]:
    """x in steps of E4M3 under a scale; the gradient passes straight through.

    Args:
        x: Any floating dtype.
        scale: What 1 stands for; positive. Numbers beyond 448 of it become 448.
    """
    with torch.no_grad():
        scale = scale.float()
        steps = (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        # What is added is a constant, so that gradients are those of x.
        change = (steps.float() * scale).to(x.dtype) - x
    return x + change


def scale_of(
    x: Float[Tensor, "*shape"],
    dims: tuple[int, ...],
    valid: Bool[Tensor, "*broadcast"] | None = None,
) -> Float[Tensor, "*reduced"]:
    """The scale under which the largest number along some axes is E4M3's largest.

    Args:
        x: Any floating dtype.
        dims: Axes that share a scale; they stay, with length 1.
        valid: Which entries count; None is all.
    """
    size = x.detach().abs().float()
    size = size if valid is None else size.masked_fill(~valid, 0)
    return (
        size.amax(dims, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny * 2**10) / E4M3_MAX
    )


def to_integers(
    x: Float[Tensor, "*shape"], largest: int, valid: Bool[Tensor, "*broadcast"] | None = None
) -> Float[Tensor, "*shape"]:
    """x in as many steps to either side as an integer has, one scale for its last two axes.

    Args:
        x: Any floating dtype.
        largest: The largest integer, such as 127.
        valid: Which entries the scale counts; None is all.
    """
    size = x.detach().abs().float()
    size = size if valid is None else size.masked_fill(~valid, 0)
    scale = size.amax((-2, -1), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny * 2**10)
    scale = scale / largest
    with torch.no_grad():
        change = ((x.float() / scale).round().clamp(-largest, largest) * scale).to(x.dtype) - x
    return x + change
