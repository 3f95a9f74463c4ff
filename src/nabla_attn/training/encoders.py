"""Videos and captions to the latents and conditions of training, through the pipeline itself."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nabla_attn.training.families import (
    CLEAN,
    EXTRA_CHANNELS,
    EXTRA_LATENTS,
    TOKEN_TIMES,
    Conditions,
    Family,
    check_size,
    family_of,
)


@torch.no_grad()
def encode_video(pipeline: Any, frames: np.ndarray) -> Tensor:
    """Encode a video to the mean of its latents, normalised as the transformer expects them.

    Args:
        pipeline: A pipeline of a known family.
        frames: The video, uint8 [frames, height, width, 3].

    Returns:
        float32 [*layout of the family] on the CPU.

    Raises:
        ValueError: The model cannot take the size.
    """
    family, vae = family_of(pipeline), pipeline.vae
    check_size(pipeline, *frames.shape[:3])
    video = torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2)[None]
    video = (video.to(vae.device).float() / 127.5 - 1).to(vae.dtype)
    latents = _normalise(vae, vae.encode(video).latent_dist.mode().float())[0]
    return _to_layout(latents, family.layout).contiguous().cpu()


@torch.no_grad()
def encode_caption(
    pipeline: Any,
    caption: str,
    *,
    frames: int,
    height: int,
    width: int,
    image: np.ndarray | None = None,
) -> Conditions:
    """The arguments that the pipeline gives its transformer, besides noisy latents and time.

    Args:
        pipeline: A pipeline of a known family.
        caption: The caption; it may be empty.
        frames: Number of video frames.
        height: Height in pixels.
        width: Width in pixels.
        image: First frame, uint8 [height, width, 3]; without one, its conditions are left out.

    Returns:
        Tensors without batch axis, by argument; parts of a tuple as "name.0", "name.1", ...

    Raises:
        ValueError: The model cannot take the size.
    """
    family = family_of(pipeline)
    check_size(pipeline, frames, height, width)
    if image is not None:
        return _record(pipeline, family, caption, image, frames)
    black = np.zeros((height, width, 3), np.uint8)
    found = _record(pipeline, family, caption, black, frames)
    return {name: value for name, value in found.items() if name not in family.by_image}


@torch.no_grad()
def encode_first_frame(pipeline: Any, frames: np.ndarray) -> Conditions:
    """The arguments that the pipeline gives its transformer for a video's first frame.

    Args:
        pipeline: A pipeline of a known family.
        frames: The video, uint8 [frames, height, width, 3].

    Returns:
        Tensors without batch axis, by argument; none where the pipeline takes no image.

    Raises:
        ValueError: The model cannot take the size.
    """
    family = family_of(pipeline)
    if not family.by_image:
        return {}
    check_size(pipeline, *frames.shape[:3])
    found = _record(pipeline, family, "", frames[0], len(frames))
    return {name: value for name, value in found.items() if name in family.by_image}


def _record(
    pipeline: Any, family: Family, caption: str, image: np.ndarray, frames: int
) -> Conditions:
    """All conditions of the pipeline's first call of its transformer."""
    height, width, _ = image.shape
    images = {"image": Image.fromarray(image)} if family.takes_image else {}
    model = pipeline.transformer
    with _stopped_at(model) as seen, _quiet(pipeline), _unguided(pipeline, family) as guidance:
        pipeline(
            prompt=caption,
            height=height,
            width=width,
            num_frames=frames,
            # Some schedulers cannot be set to one step; the first is enough.
            num_inference_steps=2,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
            **images,
            **guidance,
        )
    hidden, timestep = seen.pop("hidden_states"), seen.pop("timestep")
    for name in ("return_dict", *family.times, *family.fixed, *family.ignored):
        seen.pop(name, None)
    conditions = _first_frame_masks(family, hidden, timestep)
    for name, value in seen.items():
        conditions |= _flatten(name, value, is_batched=name not in family.unbatched)
    axis, count = family.channel_axis, _latent_channels(pipeline)
    extra = hidden.narrow(axis, count, hidden.shape[axis] - count)
    if EXTRA_LATENTS in (*family.by_image, *family.by_grid):
        return conditions | _flatten(EXTRA_LATENTS, extra, is_batched=True)
    return conditions | ({EXTRA_CHANNELS: torch.tensor(extra.shape[axis])} if extra.numel() else {})


def _first_frame_masks(family: Family, hidden: Tensor, timestep: Tensor) -> Conditions:
    """Masks of where the transformer's first input shows the image, and of its time there."""
    masks: Conditions = {}
    if family.has_token_times:
        masks[TOKEN_TIMES] = (timestep[0] != 0).float().cpu()
    if family.keeps_first and family.layout == "tokens c":
        masks[CLEAN] = 1 - masks[TOKEN_TIMES].unsqueeze(-1)
    elif family.keeps_first:
        axis = family.layout.split().index("f")
        is_first = torch.arange(hidden.shape[1 + axis]) == 0
        masks[CLEAN] = is_first.float().view([-1 if i == axis else 1 for i in range(4)])
    return masks


class _Stop(Exception):
    """The transformer was called."""


@contextmanager
def _stopped_at(model: Any) -> Iterator[dict[str, Any]]:
    """Yield a dict that gets the arguments of the first call of a model, which ends the block."""
    seen: dict[str, Any] = {}
    signature = inspect.signature(model.forward)

    def stop(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        seen.update(signature.bind(*args, **kwargs).arguments)
        raise _Stop

    hook = model.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        yield seen
    except _Stop:
        pass
    finally:
        hook.remove()
    assert seen, "a pipeline calls its transformer"


@contextmanager
def _quiet(pipeline: Any) -> Iterator[None]:
    before = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipeline._progress_bar_config = before


@contextmanager
def _unguided(pipeline: Any, family: Family) -> Iterator[dict[str, float]]:
    """Yield the arguments that switch guidance off: a scale, or none while a guider is disabled."""
    guider = getattr(pipeline, "guider", None)
    if guider is None:
        yield {"guidance_scale": 1.0, **family.unguided}
        return
    # diffusers' pipelines read it too; there is no public name.
    was_enabled = guider._enabled
    guider.disable()
    try:
        yield {}
    finally:
        guider._enabled = was_enabled


def _flatten(name: str, value: Any, *, is_batched: bool) -> Conditions:
    if value is None:
        return {}
    if isinstance(value, Tensor):
        return {name: (value[0] if is_batched else value).detach().cpu().contiguous().clone()}
    if isinstance(value, (bool, int, float)):
        dtype = torch.float64 if isinstance(value, float) else None
        return {name: torch.tensor(value, dtype=dtype)}
    if isinstance(value, (tuple, list)):
        flat: Conditions = {}
        for index, part in enumerate(value):
            flat |= _flatten(f"{name}.{index}", part, is_batched=is_batched)
        return flat
    raise ValueError(f"the argument {name} of the transformer cannot be kept: {type(value)}.")


def _normalise(vae: Any, latents: Tensor) -> Tensor:
    """(latents - mean) * scaling factor / deviation, as far as the VAE has these."""

    def read(name: str) -> Tensor | None:
        value = vae.config.get(name)
        value = vae.__dict__["_buffers"].get(name) if value is None else value
        if value is None:
            return None
        return torch.as_tensor(value).to(latents).view(1, -1, *[1] * (latents.ndim - 2))

    mean, deviation, scale = (
        read(name) for name in ("latents_mean", "latents_std", "scaling_factor")
    )
    latents = latents if mean is None else latents - mean
    latents = latents if scale is None else latents * scale
    return latents if deviation is None else latents / deviation


def _to_layout(latents: Tensor, layout: str) -> Tensor:
    """[channels, frames, height, width] -> the layout."""
    if layout == "tokens c":
        return latents.flatten(1).T
    return latents.permute([("c", "f", "h", "w").index(axis) for axis in layout.split()])


def _latent_channels(pipeline: Any) -> int:
    config = pipeline.vae.config
    return config.get("z_dim") or config["latent_channels"]
