"""The pipelines that can be trained: one row each, for a loop that knows no family.

Conditions (text embeddings, masks, positions, ...) are not described here. They are recorded: the
pipeline itself runs until it calls its transformer (`training.encoders`), so training sees what
generation would.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from nabla_attn.sizes import patch_size, side_multiple, vae_strides

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


_LTX_GRID = ("num_frames", "height", "width", "rope_interpolation_scale")
_LTX2_GRID = ("num_frames", "height", "width", "fps", "audio_num_frames", "use_cross_timestep")
# Videos have no sound here: LTX-2's weights for it stay as they are, and the video ignores it.
_LTX2: dict[str, Any] = {
    "layout": "tokens c",
    "by_grid": (*_LTX2_GRID, "audio_hidden_states", "video_coords", "audio_coords"),
    "unbatched": _LTX2_GRID,
    "fixed": {"isolate_modalities": True},
    "unguided": {"audio_guidance_scale": 1.0},
    "frozen": "audio|av_cross_attn|a2v_cross_attn",
}
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
    Family(pipeline="LTXPipeline", layout="tokens c", by_grid=_LTX_GRID, unbatched=_LTX_GRID),
    Family(
        pipeline="LTXImageToVideoPipeline",
        layout="tokens c",
        by_grid=_LTX_GRID,
        unbatched=_LTX_GRID,
        keeps_first=True,
        has_token_times=True,
    ),
    Family(pipeline="LTX2Pipeline", times=("timestep", "sigma"), **_LTX2),
    Family(
        pipeline="LTX2ImageToVideoPipeline",
        times=("timestep", "sigma", "audio_timestep"),
        keeps_first=True,
        has_token_times=True,
        **_LTX2,
    ),
    Family(
        pipeline="CogVideoXPipeline",
        layout="f c h w",
        prediction="v_prediction",
        by_grid=("image_rotary_emb",),
        unbatched=("image_rotary_emb",),
    ),
    Family(
        pipeline="CogVideoXImageToVideoPipeline",
        layout="f c h w",
        prediction="v_prediction",
        by_grid=("image_rotary_emb",),
        unbatched=("image_rotary_emb",),
        by_image=(EXTRA_LATENTS,),
    ),
    Family(
        pipeline="Kandinsky5T2VPipeline",
        layout="f h w c",
        by_grid=("visual_rope_pos", "scale_factor"),
        unbatched=("visual_rope_pos", "scale_factor", "text_rope_pos"),
        ignored=("sparse_params",),
    ),
    Family(
        pipeline="Kandinsky5I2VPipeline",
        layout="f h w c",
        by_grid=("visual_rope_pos", "scale_factor", EXTRA_LATENTS),
        unbatched=("visual_rope_pos", "scale_factor", "text_rope_pos"),
        ignored=("sparse_params",),
        keeps_first=True,
    ),
    Family(pipeline="MochiPipeline", is_reversed=True),
)
_TABLE = {row.pipeline: row for row in _ROWS}
# Wan 2.2 5B: the same class as Wan 2.1, with `expand_timesteps` in its configuration.
_WAN_TOKEN_TIMES = Family(
    pipeline="WanImageToVideoPipeline", keeps_first=True, has_token_times=True
)


def family_of(pipeline: Any) -> Family:
    """The family of a pipeline that can be trained.

    Raises:
        ValueError: Its class has no row, or it has no VAE, text encoder or transformer.
    """
    family = find_family(type(pipeline), pipeline.config)
    parts = {"vae": "VAE", "text_encoder": "text encoder", "tokenizer": "tokenizer"}
    for name, meaning in {**parts, "transformer": "transformer"}.items():
        if getattr(pipeline, name, None) is None:
            raise ValueError(
                f"this {family.pipeline} has no {meaning}. Training needs the whole pipeline: "
                f"load a directory whose model_index.json names {name}."
            )
    patch = patch_size(pipeline.transformer)
    if family.layout == "tokens c" and patch != (1, 1, 1):
        raise ValueError(f"{family.pipeline} with patches of {patch} cannot be trained.")
    return family


def find_family(pipeline_class: type, config: Mapping[str, Any]) -> Family:
    """The family of a pipeline class, or of its nearest base class.

    Args:
        pipeline_class: A pipeline class of diffusers.
        config: The pipeline's configuration, as in its `model_index.json`.

    Raises:
        ValueError: It has no row.
    """
    names = [cls.__name__ for cls in pipeline_class.__mro__]
    family = next((_TABLE[name] for name in names if name in _TABLE), None)
    if family is None:
        raise ValueError(
            f"{names[0]} cannot be trained: how it encodes videos is not known. "
            f"Known: {', '.join(_TABLE)}."
        )
    if family.pipeline == _WAN_TOKEN_TIMES.pipeline and config.get("expand_timesteps"):
        return _WAN_TOKEN_TIMES
    return family


def size_steps(pipeline: Any) -> tuple[int, int, int]:
    """The sizes a model takes: frames a + b n, and height and width in multiples of c.

    Returns:
        (a, b, c): fewest frames, step of frames, step of height and width.
    """
    temporal, _ = vae_strides(pipeline)
    patch_frames, _, _ = patch_size(pipeline.transformer)
    # The latent frames, 1 + (frames - 1) / temporal, are cut into patches.
    fewest, step = 1 + (patch_frames - 1) * temporal, patch_frames * temporal
    if find_family(type(pipeline), pipeline.config).keeps_first:
        # The image alone leaves nothing to predict.
        fewest += step
    return fewest, step, side_multiple(pipeline)[0]


def check_size(pipeline: Any, frames: int, height: int, width: int) -> None:
    """Check that the model takes a size.

    Raises:
        ValueError: It does not; the sizes that it takes are named.
    """
    fewest, step, multiple = size_steps(pipeline)
    if frames < fewest or (frames - fewest) % step:
        raise ValueError(
            f"{frames} frames do not fit this model: it takes {step}n+{fewest}, "
            f"such as {fewest + step * max(0, (frames - fewest) // step)}."
        )
    for name, value in (("height", height), ("width", width)):
        if value < 1 or value % multiple:
            raise ValueError(
                f"{name} {value} does not fit this model: it takes multiples of {multiple}."
            )
