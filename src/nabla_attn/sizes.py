"""How a pipeline's VAE and patches make tokens of a video's frames and pixels."""

import math
from typing import Any

AXES = ("temporal", "spatial")
# diffusers' names of a VAE's stride along an axis.
STRIDES = ("vae_scale_factor_{}", "vae_{}_scale_factor", "vae_{}_compression_ratio")
# Their VAEs have no first frame of its own where the number of frames is even.
WITHOUT_FIRST_FRAME = ("AllegroPipeline",)
# Their VAEs decode latent frames in pairs after the first, and make more of an odd number.
IN_PAIRS = ("CogVideoX", "ConsisID")


def denoisers(pipeline: Any) -> list[Any]:
    """The pipeline's video transformers: one, or two for Wan 2.2."""
    parts = (getattr(pipeline, name, None) for name in ("transformer", "transformer_2"))
    return [part for part in parts if part is not None]


def patch_size(model: Any) -> tuple[int, int, int]:
    """Latent cells of one token along (frames, height, width), from the model's config."""
    config: Any = model.config
    size = config.patch_size
    if isinstance(size, int):
        return getattr(config, "patch_size_t", None) or 1, size, size
    frames, height, width = size
    return frames, height, width


def vae_strides(pipeline: Any) -> tuple[int, int]:
    """Video frames of a latent frame, and pixels along a side of a latent pixel.

    Raises:
        ValueError: The pipeline does not say.
    """
    found = []
    for axis in AXES:
        names = [name.format(axis) for name in STRIDES]
        values = [getattr(pipeline, name) for name in names if hasattr(pipeline, name)]
        if not values:
            raise ValueError(
                f"{type(pipeline).__name__} does not say how its VAE shrinks videos: it has none "
                f"of {', '.join(names)}."
            )
        found.append(int(values[0]))
    return found[0], found[1]


def side_multiple(pipeline: Any) -> tuple[int, int]:
    """What height and width must be multiples of."""
    _, height, width = patch_size(denoisers(pipeline)[0])
    _, spatial = vae_strides(pipeline)
    # diffusers' pipelines refuse sizes off a grid of 16 whatever their patches.
    return math.lcm(16, spatial * height), math.lcm(16, spatial * width)


def frame_step(pipeline: Any) -> int:
    """What the number of frames beside the first must be a multiple of."""
    temporal, _ = vae_strides(pipeline)
    return temporal * (2 if type(pipeline).__name__.startswith(IN_PAIRS) else 1)


def fits_frames(pipeline: Any, frames: int) -> bool:
    """Whether the VAE gives back as many frames as are asked for."""
    return (frames - _has_first_frame(pipeline, frames)) % frame_step(pipeline) == 0


def token_grid(pipeline: Any, frames: int, height: int, width: int) -> tuple[int, int, int]:
    """The transformer's tokens (frames, height, width) of a video."""
    temporal, spatial = vae_strides(pipeline)
    patch_frames, patch_height, patch_width = patch_size(denoisers(pipeline)[0])
    first = _has_first_frame(pipeline, frames)
    latent_frames = (frames - first) // temporal + first
    return (
        # The last patch of CogVideoX 1.5 may hold one latent frame.
        -(-latent_frames // patch_frames),
        height // (spatial * patch_height),
        width // (spatial * patch_width),
    )


def _has_first_frame(pipeline: Any, frames: int) -> int:
    is_even = frames % 2 == 0
    return 0 if is_even and type(pipeline).__name__ in WITHOUT_FIRST_FRAME else 1
