"""What a pipeline family needs to be trained by a loop that knows no family: one row each.

Conditions (text embeddings, masks, positions, ...) are not described here. They are recorded: the
pipeline itself runs until its transformer is called (`training.encoders`), so they are what
generation would use.
"""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one pipeline class is trained.

    Attributes:
        pipeline: the class.
        layout: axes of the transformer's input after the batch: "c f h w", "f c h w", "f h w c",
            or "tokens c".
        by_grid: arguments of the transformer that follow from the video's size; no batch axis.
        by_length: arguments that follow from the length of the text; no batch axis.
        ignored: arguments that NABLA replaces.
    """

    pipeline: str
    layout: str = "c f h w"
    by_grid: tuple[str, ...] = ()
    by_length: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


_ROWS = (
    Family(pipeline="WanPipeline"),
    Family(pipeline="HunyuanVideoPipeline"),
    Family(
        pipeline="LTXPipeline",
        layout="tokens c",
        by_grid=("num_frames", "height", "width", "rope_interpolation_scale"),
    ),
    Family(pipeline="CogVideoXPipeline", layout="f c h w", by_grid=("image_rotary_emb",)),
    Family(
        pipeline="Kandinsky5T2VPipeline",
        layout="f h w c",
        by_grid=("visual_rope_pos", "scale_factor"),
        by_length=("text_rope_pos",),
        ignored=("sparse_params",),
    ),
    Family(pipeline="MochiPipeline"),
)
_TABLE = {row.pipeline: row for row in _ROWS}


def family_of(pipeline: Any) -> Family:
    """The family of a pipeline that can be trained.

    Raises:
        ValueError: its class has no row, or it has no VAE, text encoder or transformer.
    """
    name_of_class = type(pipeline).__name__
    family = find_family(type(pipeline))
    parts = {"vae": "VAE", "text_encoder": "text encoder", "tokenizer": "tokenizer"}
    for name, meaning in {**parts, "transformer": "transformer"}.items():
        if getattr(pipeline, name, None) is None:
            raise ValueError(
                f"this {name_of_class} has no {meaning}. Training needs the whole pipeline: load a "
                f"directory whose model_index.json names {name}."
            )
    if family.layout == "tokens c" and _patch(pipeline) != (1, 1, 1):
        raise ValueError(f"{name_of_class} with patches of {_patch(pipeline)} cannot be trained.")
    return family


def size_steps(pipeline: Any) -> tuple[int, int, int]:
    """Frames come in a + b n with (a, b) the first two; height and width in multiples of the third.

    Returns:
        (fewest frames, step of frames, step of height and width).
    """
    temporal, spatial = _strides(pipeline)
    patch_frames, patch, _ = _patch(pipeline)
    # The latent frames, 1 + (frames - 1) / temporal, are cut into patches.
    fewest = 1 + (patch_frames - 1) * temporal
    # diffusers' pipelines refuse sizes off a grid of 16 whatever their patches.
    return fewest, patch_frames * temporal, math.lcm(16, spatial * patch)


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


def _strides(pipeline: Any) -> tuple[int, int]:
    """Video frames of a latent frame, and pixels along a side of a latent pixel."""
    found = []
    for axis in ("temporal", "spatial"):
        names = (
            f"vae_scale_factor_{axis}",
            f"vae_{axis}_scale_factor",
            f"vae_{axis}_compression_ratio",
        )
        name = next(name for name in names if hasattr(pipeline, name))
        found.append(int(getattr(pipeline, name)))
    return found[0], found[1]


def _patch(pipeline: Any) -> tuple[int, int, int]:
    """Latent frames, rows and columns of a token."""
    config = pipeline.transformer.config
    patch = config.patch_size
    if isinstance(patch, int):
        return (config.get("patch_size_t") or 1, patch, patch)
    return tuple(patch)
