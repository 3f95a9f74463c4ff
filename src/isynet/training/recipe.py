"""Every number of a training run, and the learning rate that follows from them."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

COSINE_TURN = 0.94
"""Share of half a turn that the published cosine runs through."""

RATE_FLOOR = 1e-5
"""Added to the factor of the learning rate at every step."""


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; the defaults are the published ones but for the length.

    Source: the configuration files of mindspore-ai/models, research/cv/ISyNet: 550 epochs of
    ImageNet in batches of 1,024, 40 of them warm-up.

    Attributes:
        steps: Optimizer steps.
        batch: Images of a step.
        warmup: Steps in which the learning rate rises to its top.
        learning_rate: Top learning rate of AdamW.
        weight_decay: Decay of weights; biases and norms have none.
        betas: Averages of AdamW.
        smoothing: Label smoothing.
        augment: Magnitude of random augmentation, 0 to 10; 0 is none. Published: 9.
        augment_std: Deviation of the magnitude. Published: 0.5.
        clip_norm: Largest norm of the gradient; 0 for no limit. Published: none.
        peer: Architecture of a second network to learn with (deep mutual learning); empty for none.
            Published: isynet-n3-s2.
        mutual_weight: Weight of the divergence between the two networks. Published: 0.5.
    """

    steps: int = 1000
    batch: int = 128
    warmup: int = 70
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    smoothing: float = 0.1
    augment: float = 9.0
    augment_std: float = 0.5
    clip_norm: float = 0.0
    peer: str = ""
    mutual_weight: float = 0.5

    def __post_init__(self) -> None:
        checks = {
            "steps": self.steps >= 1,
            "batch": self.batch >= 2,
            "warmup": 0 <= self.warmup < self.steps,
            "learning_rate": 0 < self.learning_rate < math.inf,
            "weight_decay": 0 <= self.weight_decay < math.inf,
            "smoothing": 0 <= self.smoothing < 1,
            "augment": 0 <= self.augment <= 10,
            "clip_norm": 0 <= self.clip_norm < math.inf,
        }
        for name, is_good in checks.items():
            if not is_good:
                rule = f" (below the {self.steps} steps)" if name == "warmup" else ""
                raise ValueError(
                    f"recipe: {name} is out of range{rule}: got {getattr(self, name)}."
                )

    def rate(self, step: int) -> float:
        """Learning rate of a step, from 0.

        A linear warm-up, then the published curve: a line to zero times a cosine that stops before
        its end.
        """
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        span = self.steps - self.warmup
        line = (self.steps - step) / span
        cosine = 0.5 * (1 + math.cos(COSINE_TURN * math.pi * (step - self.warmup) / span))
        return self.learning_rate * (line * cosine + RATE_FLOOR)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values."""
        return {**asdict(self), "betas": list(self.betas)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """Read what `to_dict` wrote.

        Raises:
            ValueError: An unknown field, or a value out of range.
        """
        known = {item.name for item in fields(cls)}
        if unknown := values.keys() - known:
            raise ValueError(f"recipe: unknown {', '.join(sorted(unknown))}.")
        betas = {"betas": tuple(values["betas"])} if "betas" in values else {}
        return cls(**{**values, **betas})
