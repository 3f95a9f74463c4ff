"""Flow matching as the pipeline's scheduler expects it (`prediction_type="flow_prediction"`)."""

import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000
GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it, without their whole part, cover 0 to 1 evenly however many there are."""


def spread_times(step: int, batch: int, shift: float) -> Tensor:
    """Noise levels [batch] in (0, 1), spread evenly within a batch and over successive batches.

    An additive golden-ratio sequence covers the levels evenly at any batch size, 1 included.

    Args:
        step: Number of the training step.
        batch: How many levels.
        shift: More than 1 moves the levels to more noise, as the scheduler's `flow_shift` does.
    """
    index = torch.arange(step * batch + 1, (step + 1) * batch + 1, dtype=torch.float64)
    even = (index * GOLDEN) % 1
    return (shift * even / (1 + (shift - 1) * even)).float()


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The straight path from data to noise: (1 - sigma) latents + sigma noise.

    Args:
        latents: [batch, ...].
        noise: As latents.
        sigma: Noise level of every sample, [batch].
    """
    sigma = sigma.view(-1, *[1] * (latents.ndim - 1))
    return (1 - sigma) * latents + sigma * noise


def flow_target(latents: Tensor, noise: Tensor) -> Tensor:
    """What the network predicts: the path's velocity, noise - latents."""
    return noise - latents
