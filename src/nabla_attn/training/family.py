"""How one pipeline class is trained, for a loop that knows no family.

Conditions (text embeddings, masks, positions, ...) are not described here. They are recorded: the
pipeline itself runs until it calls its transformer (`training.encoders`), so training sees what
generation would.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

EXTRA_CHANNELS = "extra_channels"
"""Condition: zero channels that the transformer expects after those of the latents."""

EXTRA_LATENTS = "extra_latents"
"""Condition: channels after those of the latents, such as those that show the first frame."""

CLEAN = "clean"
"""Condition: 1 where latents show the first frame, without noise and loss; [*layout], 1 channel."""

TOKEN_TIMES = "token_times"
"""Condition: factor of each token's time, [tokens]."""

SEGMENTS, TEXTS = "segments", "texts"
"""Conditions of packed clips: latent frames and text tokens of each, [1, clips]."""

Conditions = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one pipeline class is trained.

    Attributes:
        pipeline: Name of the class.
        layout: Axes of the transformer's input after the batch: "c f h w", "f c h w", "f h w c",
            or "tokens c".
        prediction: Kind of the transformer's prediction: "flow" (velocity of the straight path) or
            "v_prediction" (for schedulers with `alphas_cumprod`).
        is_reversed: Whether time grows from noise to data, as in Mochi.
        by_grid: Arguments of the transformer that follow from the video's size.
        unbatched: Arguments of the transformer without a batch axis.
        times: Arguments of the transformer that carry the time.
        fixed: Arguments of the transformer that are always the same in training.
        unguided: Arguments of the pipeline, beside the usual one, that switch guidance off.
        frozen: Regular expression found in the names of parameters that are not trained.
        by_image: Conditions that follow from the first frame, for pipelines that take one.
        keeps_first: Whether the first frame's latents stay those of the image at every noise level.
        has_token_times: Whether the transformer takes a time for every token.
        ignored: Arguments that NABLA replaces.
        cross_attention: Regular expression that matches the paths of the modules that see the text
            and nothing else; empty where there are none, and clips cannot be packed.
        timestep_scale: Timestep of pure noise.
    """

    pipeline: str
    layout: str = "c f h w"
    prediction: Literal["flow", "v_prediction"] = "flow"
    is_reversed: bool = False
    by_grid: tuple[str, ...] = ()
    unbatched: tuple[str, ...] = ()
    times: tuple[str, ...] = ("timestep",)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    unguided: Mapping[str, float] = field(default_factory=dict)
    frozen: str = ""
    by_image: tuple[str, ...] = ()
    keeps_first: bool = False
    has_token_times: bool = False
    ignored: tuple[str, ...] = ()
    cross_attention: str = ""
    timestep_scale: float = 1000.0

    @property
    def channel_axis(self) -> int:
        """Axis of the channels in [batch, *layout]."""
        return 1 + self.layout.split().index("c")

    @property
    def takes_image(self) -> bool:
        """Whether the pipeline is given the video's first frame."""
        return self.keeps_first or bool(self.by_image)

    def timestep(self, sigma: Tensor) -> Tensor:
        """The transformer's time argument for noise levels [batch] in [0, 1]; 1 is pure noise."""
        return (1 - sigma if self.is_reversed else sigma) * self.timestep_scale

    def flow_target(self, latents: Tensor, noise: Tensor) -> Tensor:
        """The target of a flow-matching transformer."""
        return latents - noise if self.is_reversed else noise - latents

    def inputs(self, noisy: Tensor, timestep: Tensor, conditions: Conditions) -> dict[str, Any]:
        """Arguments of the transformer's forward.

        Args:
            noisy: Noisy latents, [batch, *layout].
            timestep: Times, [batch], from `timestep` or as the scheduler counts.
            conditions: Conditions as `collate` stacks them, [batch, ...] each.
        """
        values = dict(conditions)
        values.pop(CLEAN, None)
        times = dict.fromkeys(self.times, timestep)
        if TOKEN_TIMES in values:
            times["timestep"] = timestep.unsqueeze(-1) * values.pop(TOKEN_TIMES)
        extra = values.pop(EXTRA_LATENTS, None)
        if EXTRA_CHANNELS in values:
            shape = list(noisy.shape)
            shape[self.channel_axis] = int(values.pop(EXTRA_CHANNELS)[0])
            extra = noisy.new_zeros(shape)
        if extra is not None:
            noisy = torch.cat([noisy, extra.to(noisy)], self.channel_axis)
        plain: dict[str, Any] = {}
        if SEGMENTS in values:
            packed = {name: tuple(values.pop(name)[0].tolist()) for name in (SEGMENTS, TEXTS)}
            plain["attention_kwargs"] = packed
        parts: dict[str, dict[int, Any]] = {}
        for key, value in values.items():
            name, dot, place = key.partition(".")
            entry = _first(value) if name in self.unbatched else value
            if dot:
                parts.setdefault(name, {})[int(place)] = entry
            else:
                plain[name] = entry
        sequences = {name: tuple(part[i] for i in sorted(part)) for name, part in parts.items()}
        return {"hidden_states": noisy, **times, **plain, **sequences, **self.fixed}

    def is_by_grid(self, name: str) -> bool:
        """Whether a condition follows from the video's size alone, whatever the caption."""
        names = (*self.by_grid, EXTRA_CHANNELS, CLEAN, TOKEN_TIMES)
        return name.partition(".")[0] in names


def _first(value: Tensor) -> Any:
    """One of equal entries; numbers as numbers."""
    return value[0].item() if value.ndim == 1 else value[0]
