"""What a pipeline family needs to be trained by a loop that knows no family: one row each.

Conditions (text embeddings, masks, positions, ...) are not described here. They are recorded: the
pipeline itself runs until its transformer is called (`training.encoders`), so they are what
generation would use.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from nabla_attn.sizes import patch_size, side_multiple, vae_strides

EXTRA_CHANNELS = "extra_channels"
"""Condition: zero channels that the transformer expects after those of the latents."""

EXTRA_LATENTS = "extra_latents"
"""Condition: channels after those of the latents that show the first frame."""

SEGMENTS, TEXTS = "segments", "texts"
"""Conditions of packed clips: latent frames and text tokens of each, [1, clips]."""

Conditions = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one pipeline class is trained.

    Attributes:
        pipeline: the class.
        layout: axes of the transformer's input after the batch: "c f h w", "f c h w", "f h w c",
            or "tokens c".
        prediction: what the transformer predicts: "flow" (velocity of the straight path) or
            "v_prediction" (of a scheduler with `alphas_cumprod`).
        is_reversed: a flow from noise to data with time growing towards data, as in Mochi.
        by_grid: arguments of the transformer that follow from the video's size.
        unbatched: arguments of the transformer without a batch axis.
        by_image: conditions that follow from the video's first frame, which the pipeline is given.
        ignored: arguments that NABLA replaces.
        cross_attention: regular expression that matches the paths of the modules that see the text
            and nothing else; empty where there are none, and clips cannot be packed.
        timestep_scale: timestep of pure noise.
    """

    pipeline: str
    layout: str = "c f h w"
    prediction: Literal["flow", "v_prediction"] = "flow"
    is_reversed: bool = False
    by_grid: tuple[str, ...] = ()
    unbatched: tuple[str, ...] = ()
    by_image: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    cross_attention: str = ""
    timestep_scale: float = 1000.0

    @property
    def channel_axis(self) -> int:
        """Axis of the channels in [batch, *layout]."""
        return 1 + self.layout.split().index("c")

    def timestep(self, sigma: Tensor) -> Tensor:
        """What the transformer is told of noise levels [batch] in [0, 1]; 1 is pure noise."""
        return (1 - sigma if self.is_reversed else sigma) * self.timestep_scale

    def flow_target(self, latents: Tensor, noise: Tensor) -> Tensor:
        """What a flow-matching transformer predicts."""
        return latents - noise if self.is_reversed else noise - latents

    def inputs(self, noisy: Tensor, timestep: Tensor, conditions: Conditions) -> dict[str, Any]:
        """Arguments of the transformer's forward.

        Args:
            noisy: noisy latents [batch, *layout].
            timestep: [batch], as `timestep` gives it or as the scheduler counts.
            conditions: as `collate` stacks them: [batch, ...] each.
        """
        values = dict(conditions)
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
            entry = _first(value) if name in (*self.by_grid, *self.unbatched) else value
            if dot:
                parts.setdefault(name, {})[int(place)] = entry
            else:
                plain[name] = entry
        sequences = {name: tuple(part[i] for i in sorted(part)) for name, part in parts.items()}
        return {"hidden_states": noisy, "timestep": timestep, **plain, **sequences}


_ROWS = (
    Family(pipeline="WanPipeline", cross_attention=r"blocks\.\d+\.attn2"),
    Family(
        pipeline="WanImageToVideoPipeline",
        by_image=(EXTRA_LATENTS, "encoder_hidden_states_image"),
    ),
    Family(pipeline="SkyReelsV2Pipeline"),
    Family(
        pipeline="SkyReelsV2ImageToVideoPipeline",
        by_image=(EXTRA_LATENTS, "encoder_hidden_states_image"),
    ),
    Family(pipeline="HunyuanVideoPipeline"),
    Family(pipeline="HunyuanSkyreelsImageToVideoPipeline", by_image=(EXTRA_LATENTS,)),
    Family(pipeline="HunyuanVideo15Pipeline"),
    Family(pipeline="MotifVideoPipeline"),
    Family(pipeline="EasyAnimatePipeline"),
    Family(
        pipeline="LTXPipeline",
        layout="tokens c",
        by_grid=("num_frames", "height", "width", "rope_interpolation_scale"),
    ),
    Family(
        pipeline="CogVideoXPipeline",
        layout="f c h w",
        prediction="v_prediction",
        by_grid=("image_rotary_emb",),
    ),
    Family(
        pipeline="CogVideoXImageToVideoPipeline",
        layout="f c h w",
        prediction="v_prediction",
        by_grid=("image_rotary_emb",),
        by_image=(EXTRA_LATENTS,),
    ),
    Family(
        pipeline="Kandinsky5T2VPipeline",
        layout="f h w c",
        by_grid=("visual_rope_pos", "scale_factor"),
        unbatched=("text_rope_pos",),
        ignored=("sparse_params",),
    ),
    Family(pipeline="MochiPipeline", is_reversed=True),
)
_TABLE = {row.pipeline: row for row in _ROWS}


def family_of(pipeline: Any) -> Family:
    """The family of a pipeline that can be trained.

    Raises:
        ValueError: its class has no row, or it has no VAE, text encoder or transformer.
    """
    family = find_family(type(pipeline))
    parts = {"vae": "VAE", "text_encoder": "text encoder", "tokenizer": "tokenizer"}
    for name, meaning in {**parts, "transformer": "transformer"}.items():
        if getattr(pipeline, name, None) is None:
            raise ValueError(
                f"this {family.pipeline} has no {meaning}. Training needs the whole pipeline: "
                f"load a directory whose model_index.json names {name}."
            )
    patch = patch_size(pipeline.transformer)
    if family.by_image and pipeline.config.get("expand_timesteps"):
        raise ValueError(
            f"this {family.pipeline} gives each token a time of its own and keeps the first frame "
            "clean (Wan 2.2 5B), which cannot be trained. Its WanPipeline can."
        )
    if family.layout == "tokens c" and patch != (1, 1, 1):
        raise ValueError(f"{family.pipeline} with patches of {patch} cannot be trained.")
    return family


def find_family(pipeline_class: type) -> Family:
    """The family of a pipeline class, or of its nearest base class.

    Raises:
        ValueError: it has no row.
    """
    names = [cls.__name__ for cls in pipeline_class.__mro__]
    family = next((_TABLE[name] for name in names if name in _TABLE), None)
    if family is None:
        raise ValueError(
            f"{names[0]} cannot be trained: how it encodes videos is not known. "
            f"Known: {', '.join(_TABLE)}."
        )
    return family


def size_steps(pipeline: Any) -> tuple[int, int, int]:
    """Frames come in a + b n with (a, b) the first two; height and width in multiples of the third.

    Returns:
        (fewest frames, step of frames, step of height and width).
    """
    temporal, _ = vae_strides(pipeline)
    patch_frames, _, _ = patch_size(pipeline.transformer)
    # The latent frames, 1 + (frames - 1) / temporal, are cut into patches.
    fewest = 1 + (patch_frames - 1) * temporal
    return fewest, patch_frames * temporal, side_multiple(pipeline)[0]


def check_size(pipeline: Any, frames: int, height: int, width: int) -> None:
    """See that the model takes a size.

    Raises:
        ValueError: it does not; what it takes is named.
    """
    fewest, step, multiple = size_steps(pipeline)
    if frames < fewest or (frames - fewest) % step:
        raise ValueError(f"{frames} frames do not fit this model: it takes {step}n+{fewest}.")
    for name, value in (("height", height), ("width", width)):
        if value < 1 or value % multiple:
            raise ValueError(
                f"{name} {value} does not fit this model: it takes multiples of {multiple}."
            )


def is_by_grid(family: Family, name: str) -> bool:
    """Whether a condition follows from the video's size alone, whatever the caption."""
    return name.partition(".")[0] in (*family.by_grid, EXTRA_CHANNELS)


def _first(value: Tensor) -> Any:
    """One of equal entries; numbers as numbers."""
    return value[0].item() if value.ndim == 1 else value[0]
