"""Noise levels and noisy latents, exactly as a pipeline's scheduler has them."""

import warnings
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from nabla_attn.training.config import ObjectiveConfig
from nabla_attn.training.family import CLEAN, Family
from nabla_attn.training.flow import add_noise


@dataclass(frozen=True)
class Noised:
    """Latents with noise, and what a network should say about them.

    Attributes:
        latents: What the network sees, [batch, ...].
        timestep: Its time argument, [batch].
        target: What it should predict, as `latents`.
        weight: 0 where nothing is asked of it, else 1, broadcasts to `latents`; None is 1.
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
    """A batch with noise, but for latents that show an image, where nothing is predicted.

    Args:
        path: How data becomes noise.
        batch: {"latents": [batch, ...], "conditions": dict of [batch, ...]}.
        generator: Of the CPU; noise and levels are drawn from it.
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
        family: What the network is told of a level, and what it predicts.
        shift: More than 1 moves the levels to more noise.
        times: "uniform" or "logit-normal" before the shift.
        logit_mean: Of the logit-normal levels.
        logit_std: Of the logit-normal levels.
    """

    family: Family
    shift: float = 1.0
    times: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0

    def draw_levels(self, count: int, generator: torch.Generator) -> Tensor:
        """Noise levels in (0, 1), float32 [count]."""
        if self.times == "uniform":
            levels = torch.rand(count, generator=generator, dtype=torch.float64)
        else:
            normal = torch.randn(count, generator=generator, dtype=torch.float64)
            levels = torch.sigmoid(self.logit_mean + self.logit_std * normal)
        return (self.shift * levels / (1 + (self.shift - 1) * levels)).float()

    def add_noise(self, latents: Tensor, generator: torch.Generator) -> Noised:
        """Draw a level and noise for every sample of [batch, ...]."""
        level = self.draw_levels(len(latents), generator).to(latents)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        noisy = add_noise(latents, noise, level)
        return Noised(noisy, self.family.timestep(level), self.family.flow_target(latents, noise))


class VelocityPath:
    """Diffusion with v-prediction, as CogVideoX has it: the scheduler's own noise, uniform steps.

    Args:
        scheduler: Of diffusers, with `add_noise`, and with `get_velocity` or `alphas_cumprod`.
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


def path_of(scheduler: Any, family: Family, objective: ObjectiveConfig) -> NoisePath:
    """The path that a pipeline's scheduler walks back; warns of a shift that has no effect.

    Args:
        scheduler: Of diffusers.
        family: Of the pipeline.
        objective: How levels are drawn, and perhaps another shift.

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
        raise ValueError(f"{family.pipeline} is trained by flow matching, and {name} is not.")
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
    )
