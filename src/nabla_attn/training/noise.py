"""Noise levels, noisy latents and targets, exactly as a pipeline's scheduler has them."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from nabla_attn.training.families import CLEAN, Family
from nabla_attn.training.sections import ObjectiveConfig

NUM_TRAIN_TIMESTEPS = 1000
GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it, without their whole part, cover 0 to 1 evenly however many there are."""

Range = tuple[float, float]
ALL_LEVELS: Range = (0.0, 1.0)


def spread_times(step: int, batch: int, shift: float) -> Tensor:
    """Noise levels [batch] in (0, 1), spread evenly within a batch and over successive batches.

    An additive golden-ratio sequence covers the levels evenly at any batch size, 1 included.

    Args:
        step: Number of the training step.
        batch: Number of levels.
        shift: Factor by which the levels move to more noise, as the scheduler's `flow_shift` does.
    """
    index = torch.arange(step * batch + 1, (step + 1) * batch + 1, dtype=torch.float64)
    return shift_levels((index * GOLDEN) % 1, shift).float()


def shift_levels(levels: Tensor, shift: float) -> Tensor:
    """Noise levels moved to more noise (shift above 1), as flow-matching schedulers do it."""
    return shift * levels / (1 + (shift - 1) * levels)


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The straight path from data to noise: (1 - sigma) latents + sigma noise.

    Args:
        latents: Clean latents, [batch, ...].
        noise: Gaussian noise, of the shape of `latents`.
        sigma: Noise level of every sample, [batch].
    """
    sigma = sigma.view(-1, *[1] * (latents.ndim - 1))
    return (1 - sigma) * latents + sigma * noise


def flow_target(latents: Tensor, noise: Tensor) -> Tensor:
    """The target of the network: the path's velocity, noise - latents."""
    return noise - latents


def served_levels(index: Mapping[str, Any], part: str) -> Range:
    """The noise levels at which a pipeline calls one of its transformers.

    Pipelines with a `boundary_ratio`, such as Wan 2.2 A14B, give `transformer` the levels from the
    boundary up and `transformer_2` those below it.

    Args:
        index: The pipeline's `model_index.json`.
        part: The transformer's name in it.

    Raises:
        ValueError: The boundary is not a share, or the pipeline never calls that transformer.
    """
    boundary = index.get("boundary_ratio")
    if boundary is None:
        if part == "transformer":
            return ALL_LEVELS
        raise ValueError(
            f"the pipeline never calls {part}: its model_index.json has no boundary_ratio. Use "
            "part=transformer, or set the boundary_ratio that the model was made for."
        )
    is_number = isinstance(boundary, int | float) and not isinstance(boundary, bool)
    if not is_number or not 0 <= boundary <= 1:
        raise ValueError(f"boundary_ratio must be from 0 to 1: got {boundary!r}.")
    served = (float(boundary), 1.0) if part == "transformer" else (0.0, float(boundary))
    if served[0] == served[1]:
        raise ValueError(
            f"the pipeline never calls {part}: its boundary_ratio is {boundary}. Train its other "
            "transformer."
        )
    return served


@dataclass(frozen=True)
class Noised:
    """Latents with noise, and the network's target for them.

    Attributes:
        latents: Input of the network, [batch, ...].
        timestep: Time argument of the network, [batch].
        target: Target of the prediction, of the shape of `latents`.
        weight: Weight in the loss, 0 or 1; broadcasts to `latents`. None is 1.
    """

    latents: Tensor
    timestep: Tensor
    target: Tensor
    weight: Tensor | None = None


class NoisePath(Protocol):
    """How data becomes noise. All numbers are drawn on the CPU: the same on any device."""

    def add_noise(self, latents: Tensor, generator: torch.Generator) -> Noised:
        """Draw a level and noise for every sample of [batch, ...]."""


def noise_batch(path: NoisePath, batch: dict[str, Any], generator: torch.Generator) -> Noised:
    """A batch with noise, except for latents that show an image, where nothing is predicted.

    Args:
        path: How data becomes noise.
        batch: {"latents": [batch, ...], "conditions": dict of [batch, ...]}.
        generator: Generator of the CPU that noise and levels are drawn from.
    """
    latents = batch["latents"]
    noised = path.add_noise(latents, generator)
    clean = batch["conditions"].get(CLEAN)
    if clean is None:
        return noised
    kept = torch.where(clean > 0, latents, noised.latents)
    return replace(noised, latents=kept, weight=1 - clean)


@dataclass(frozen=True)
class FlowPath:
    """The straight path from data to noise, and how often each level is trained.

    Attributes:
        family: Family that defines the network's time argument and its target.
        shift: Factor by which the levels move to more noise.
        times: Distribution of the levels before the shift, "uniform" or "logit-normal".
        logit_mean: Mean of the logit-normal levels.
        logit_std: Deviation of the logit-normal levels.
        served: Lowest and highest level that the network is called at; no other one is drawn.
    """

    family: Family
    shift: float = 1.0
    times: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    served: Range = ALL_LEVELS

    def draw_levels(self, count: int, generator: torch.Generator) -> Tensor:
        """Noise levels in (0, 1), float32 [count]."""
        if self.served != ALL_LEVELS:
            return self._draw_served(count, generator)
        if self.times == "uniform":
            levels = torch.rand(count, generator=generator, dtype=torch.float64)
        else:
            normal = torch.randn(count, generator=generator, dtype=torch.float64)
            levels = torch.sigmoid(self.logit_mean + self.logit_std * normal)
        return shift_levels(levels, self.shift).float()

    def _draw_served(self, count: int, generator: torch.Generator) -> Tensor:
        """Levels of the same distribution, given that they are served: its inverse, cut."""
        ends = torch.tensor(self.served, dtype=torch.float64)
        low, high = self._share_below(shift_levels(ends, 1 / self.shift))
        share = low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)
        if self.times == "uniform":
            levels = share
        else:
            levels = torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(share))
        # A margin beyond float32's rounding: a level on the boundary would be the other network's.
        lowest, highest = (ends + ends.new_tensor([1e-6, -1e-6])).tolist()
        return shift_levels(levels, self.shift).clamp(lowest, highest).float()

    def _share_below(self, levels: Tensor) -> Tensor:
        """The share of unshifted levels below each of some."""
        if self.times == "uniform":
            return levels
        return torch.special.ndtr(
            (torch.logit(levels.clamp(0, 1)) - self.logit_mean) / self.logit_std
        )

    def add_noise(self, latents: Tensor, generator: torch.Generator) -> Noised:
        """Draw a level and noise for every sample of [batch, ...]."""
        level = self.draw_levels(len(latents), generator).to(latents)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        noisy = add_noise(latents, noise, level)
        return Noised(noisy, self.family.timestep(level), self.family.flow_target(latents, noise))


class VelocityPath:
    """Diffusion with v-prediction, as CogVideoX has it: the scheduler's own noise, uniform steps.

    Args:
        scheduler: A scheduler of diffusers with `add_noise` and `alphas_cumprod`.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    def add_noise(self, latents: Tensor, generator: torch.Generator) -> Noised:
        """Draw a step and noise for every sample of [batch, ...]."""
        count = self._scheduler.config.num_train_timesteps
        step = torch.randint(count, (len(latents),), generator=generator).to(latents.device)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        kept = self._scheduler.alphas_cumprod.to(latents)[step]
        kept = kept.view(-1, *[1] * (latents.ndim - 1))
        noisy = self._scheduler.add_noise(latents, noise, step)
        # Salimans & Ho 2022, eq. 11; what diffusers' schedulers turn back into data.
        return Noised(noisy, step, kept.sqrt() * noise - (1 - kept).sqrt() * latents)


def path_of(
    scheduler: Any, family: Family, objective: ObjectiveConfig, served: Range = ALL_LEVELS
) -> NoisePath:
    """The path that a pipeline's scheduler walks back; warns of a shift that has no effect.

    Args:
        scheduler: The pipeline's scheduler.
        family: The pipeline's family.
        objective: How levels are drawn, and perhaps another shift.
        served: Lowest and highest level at which the pipeline calls the trained transformer.

    Raises:
        ValueError: The scheduler does not fit the family, or shifts by the size of the video.
    """
    config = scheduler.config
    name = type(scheduler).__name__
    if family.prediction == "v_prediction":
        if config.get("prediction_type") != "v_prediction" or objective.times != "uniform":
            raise ValueError(
                f"{family.pipeline} is trained with v_prediction and objective.times=uniform: got "
                f"{config.get('prediction_type')} and {objective.times}."
            )
        if objective.shift is not None:
            warnings.warn(
                f"objective.shift={objective.shift:g} is ignored: {family.pipeline} is trained on "
                "the steps of its scheduler, which fix their noise levels. Drop it.",
                stacklevel=2,
            )
        return VelocityPath(scheduler)
    if "FlowMatch" not in name and config.get("prediction_type") != "flow_prediction":
        raise ValueError(
            f"{family.pipeline} is trained by flow matching: got {name}, which is no "
            "flow-matching scheduler. Use the scheduler that the model was published with."
        )
    shift = objective.shift
    if shift is None and config.get("use_dynamic_shifting"):
        raise ValueError(
            f"{name} shifts noise levels by the size of the video. Set objective.shift."
        )
    if shift is None:
        shift = config.get("flow_shift", config.get("shift")) or 1.0
    return FlowPath(
        family,
        shift=float(shift),
        times=objective.times,
        logit_mean=objective.logit_mean,
        logit_std=objective.logit_std,
        served=served,
    )
