"""Random augmentation of image batches as tensors, after RandAugment (arXiv:1909.13719).

Each image gets two operations drawn with replacement. Magnitudes follow the increasing variant that
the published recipe names (`m9-mstd0.5`).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

NUM_OPERATIONS = 2
MAX_MAGNITUDE = 10.0
PROBABILITY = 0.5
GREY = (0.299, 0.587, 0.114)
FILL = 0.5

Operation = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Images [batch, channels, height, width], strengths [batch] from 0 to 1, and signs [batch]."""


def augment(
    images: Tensor, generator: torch.Generator, magnitude: float = 9.0, std: float = 0.5
) -> Tensor:
    """Augment each image by operations of its own.

    Args:
        images: Pixels from 0 to 1, float [batch, channels, height, width].
        generator: Source of all that is random, on the CPU.
        magnitude: Mean magnitude, 0 to 10; 0 returns the images.
        std: Deviation of the magnitude.

    Returns:
        Images of the same shape, from 0 to 1.
    """
    if not magnitude:
        return images
    count = len(images)
    names = list(OPERATIONS)
    for _ in range(NUM_OPERATIONS):
        chosen = torch.randint(len(names), (count,), generator=generator)
        is_applied = torch.rand(count, generator=generator) < PROBABILITY
        strength = magnitude + std * torch.randn(count, generator=generator)
        strength = (strength / MAX_MAGNITUDE).clamp(0, 1)
        sign = (torch.rand(count, generator=generator) < 0.5).float() * 2 - 1
        result = images.clone()
        for number, name in enumerate(names):
            own = ((chosen == number) & is_applied).nonzero().flatten()
            if len(own):
                result[own] = OPERATIONS[name](images[own], strength[own], sign[own])
        images = result.clamp_(0, 1)
    return images


def _warp(images: Tensor, matrix: Tensor) -> Tensor:
    grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)
    # Outside of the image lies grey, not black, which would stand for a colour of its own.
    return functional.grid_sample(images - FILL, grid, align_corners=False) + FILL


def _identity(count: int) -> Tensor:
    return torch.eye(2, 3).repeat(count, 1, 1)


def _rotate(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    angle = strength * sign * (torch.pi / 6)
    height, width = images.shape[2:]
    matrix = _identity(len(images))
    matrix[:, 0, 0] = matrix[:, 1, 1] = angle.cos()
    # Places run from -1 to 1 on both axes, whatever the image's shape.
    matrix[:, 0, 1], matrix[:, 1, 0] = -angle.sin() * height / width, angle.sin() * width / height
    return _warp(images, matrix)


def _shear_x(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    matrix = _identity(len(images))
    matrix[:, 0, 1] = 0.3 * strength * sign
    return _warp(images, matrix)


def _shear_y(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    matrix = _identity(len(images))
    matrix[:, 1, 0] = 0.3 * strength * sign
    return _warp(images, matrix)


def _shift_x(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    matrix = _identity(len(images))
    matrix[:, 0, 2] = 0.9 * strength * sign
    return _warp(images, matrix)


def _shift_y(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    matrix = _identity(len(images))
    matrix[:, 1, 2] = 0.9 * strength * sign
    return _warp(images, matrix)


def _mix(images: Tensor, other: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    factor = (1 + 0.9 * strength * sign).view(-1, 1, 1, 1)
    return other + (images - other) * factor


def _brightness(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    return _mix(images, torch.zeros_like(images), strength, sign)


def _contrast(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    return _mix(images, _grey(images).mean((1, 2, 3), keepdim=True), strength, sign)


def _colour(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    return _mix(images, _grey(images), strength, sign)


def _sharpness(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    blurred = functional.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    return _mix(images, blurred, strength, sign)


def _invert(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    return 1 - images


def _solarize(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    threshold = (1 - strength).view(-1, 1, 1, 1)
    return torch.where(images >= threshold, 1 - images, images)


def _posterize(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    # Eight bits at strength 0, four at 1.
    levels = 2 ** (8 - (4 * strength).round()).view(-1, 1, 1, 1)
    return (images * 255 / 256 * levels).floor() / levels * 256 / 255


def _autocontrast(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low).clamp(min=1e-6), images)


def _grey(images: Tensor) -> Tensor:
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    return (images * torch.tensor(GREY).view(1, 3, 1, 1)).sum(1, keepdim=True)


OPERATIONS: dict[str, Operation] = {
    "autocontrast": _autocontrast,
    "brightness": _brightness,
    "colour": _colour,
    "contrast": _contrast,
    "invert": _invert,
    "posterize": _posterize,
    "rotate": _rotate,
    "sharpness": _sharpness,
    "shear-x": _shear_x,
    "shear-y": _shear_y,
    "shift-x": _shift_x,
    "shift-y": _shift_y,
    "solarize": _solarize,
}
"""RandAugment's operations but for equalisation of the histogram."""
