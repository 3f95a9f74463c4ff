"""Scenes encoded once and kept: the transformer trains on latents, never on pixels."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nabla_attn.files import whole_file
from nabla_attn.moving_shapes.render import render
from nabla_attn.moving_shapes.scene import Scene, sample_scene
from nabla_attn.moving_shapes.vae import encode_mean, to_model_range
from nabla_attn.progress import ProgressCallback, ignore_progress


@dataclass(frozen=True)
class LatentSet:
    """Encoded clips.

    Attributes:
        latents: Normalised, float16 [clips, channels, latent frames, height / 8, width / 8].
        scenes: What each clip shows.
    """

    latents: Tensor
    scenes: list[Scene]


def latent_scale(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the latent channels, each [1, channels, 1, 1, 1]."""
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    deviation = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    return mean, deviation


@torch.no_grad()
def _encode(vae: Any, scenes: list[Scene], frames: int, size: int) -> Tensor:
    videos = torch.stack([to_model_range(render(scene, frames, size, size)) for scene in scenes])
    mean, deviation = latent_scale(vae)
    with torch.autocast("cpu", torch.bfloat16):
        latents = encode_mean(vae, videos)
    return ((latents.float() - mean) / deviation).half()


def encode_scenes(
    vae: Any,
    folder: Path,
    *,
    clips: int,
    frames: int,
    size: int,
    seed: int,
    on_progress: ProgressCallback = ignore_progress,
) -> LatentSet:
    """Encode random training scenes, or read them back if that was done before.

    Args:
        vae: The trained VAE.
        folder: Where `latents-<frames>x<size>-<clips>.safetensors` is kept.
        clips: Number of clips.
        frames: Frames of a clip, 4 n + 1.
        size: Height and width in pixels.
        seed: Seeds the scenes.
        on_progress: Called with the clips that are done.
    """
    rng = random.Random(f"{seed} clips {frames} {size}")
    scenes = [sample_scene(rng.getrandbits(40)) for _ in range(clips)]
    path = folder / f"latents-{frames}x{size}-{clips}.safetensors"
    if not path.exists():
        batch = max(1, 32 * 64 * 64 // (size * size))
        parts = []
        for start in range(0, clips, batch):
            parts.append(_encode(vae, scenes[start : start + batch], frames, size))
            on_progress("encode", min(start + batch, clips), clips)
        with whole_file(path) as temporary:
            save_file({"latents": torch.cat(parts)}, temporary)
    return LatentSet(load_file(path)["latents"], scenes)
