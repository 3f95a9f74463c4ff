"""The VAE of the built-in model, and scenes that it encodes once for the transformer."""

import random
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nabla_attn.files import whole_file
from nabla_attn.moving_shapes.loop import RecipeStep, autocast
from nabla_attn.moving_shapes.recipe import VaeConfig, VaePhase
from nabla_attn.moving_shapes.scene import (
    BACKGROUNDS,
    Scene,
    Window,
    centred,
    render,
    sample_scene,
)
from nabla_attn.progress import ProgressCallback, ignore_progress


def build_vae(seed: int) -> AutoencoderKLWan:
    """Make an untrained VAE: spatial stride 8 (2 of it a patch), temporal stride 4, 16 channels."""
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(
        base_dim=16,
        z_dim=16,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=8,
        scale_factor_temporal=4,
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
    )
    _start_as_image_model(vae)
    return vae


@torch.no_grad()
def _start_as_image_model(vae: nn.Module) -> None:
    """Let time start as a copy of the present: a lone frame sees only the last tap of each kernel,
    so the last tap is scaled up and the others, which no image trains, start near zero."""
    for name, module in vae.named_modules():
        if not isinstance(module, nn.Conv3d) or module.kernel_size[0] == 1:
            continue
        if name.endswith("time_conv"):
            module.weight.mul_(0.1)
            channels = module.in_channels
            copy = torch.eye(channels)
            if module.out_channels == channels:  # temporal down: the mean of its frames
                module.weight[:, :, :, 0, 0] += copy[..., None] / 3
            else:  # temporal up: every frame twice
                module.weight[:, :, -1, 0, 0] += torch.cat([copy, copy])
        else:
            module.weight[:, :, :-1].mul_(0.1)
            module.weight[:, :, -1].mul_(3**0.5)


def encode_mean(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """Latent means [batch, 16, 1 + (frames - 1) / 4, height / 8, width / 8] of [-1, 1] videos."""
    return vae.encode(video).latent_dist.mode()


def decode_open(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """`AutoencoderKLWan.decode` without its last clamp, which has no gradient outside [-1, 1]."""
    vae.clear_cache()
    hidden = vae.post_quant_conv(latents)
    frames = []
    for index in range(latents.shape[2]):
        vae._conv_idx = [0]
        frames.append(
            vae.decoder(
                hidden[:, :, index : index + 1],
                feat_cache=vae._feat_map,
                feat_idx=vae._conv_idx,
                first_chunk=index == 0,
            )
        )
    vae.clear_cache()
    patches = torch.cat(frames, 2)
    batch, _, count, height, width = patches.shape
    side = vae.config.patch_size
    # Channels are (colour, x in patch, y in patch), as diffusers' own unpatchify reads them.
    patches = patches.reshape(batch, 3, side, side, count, height, width)
    return patches.permute(0, 1, 4, 5, 3, 6, 2).reshape(
        batch, 3, count, height * side, width * side
    )


def to_model_range(video: NDArray[np.uint8]) -> Tensor:
    """uint8 [frames, height, width, 3] -> float [3, frames, height, width] in [-1, 1]."""
    return torch.from_numpy(video).permute(3, 0, 1, 2).float() / 127.5 - 1


def _window(rng: random.Random, scene: Scene, share: float) -> Window:
    """A square part of the frame, `share` of its side, that shows some of a shape."""
    x, y = rng.choice(scene.shapes).centre(rng.random())
    left = min(max(x - share * rng.uniform(0.1, 0.9), 0), 1 - share)
    top = min(max(y - share * rng.uniform(0.1, 0.9), 0), 1 - share)
    return top, left, top + share, left + share


def draw_crops(phase: VaePhase, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Random crops [batch, 3, frames, size, size] and their background colours [batch, 3]."""
    videos, backgrounds = [], []
    for _ in range(phase.batch):
        scene = sample_scene(rng.getrandbits(40), rng.choice((1, 1, 2, 3)))
        share = (phase.size / phase.largest) ** rng.random()
        window = _window(rng, scene, share)
        clip = render(scene, phase.frames, phase.size, phase.size, window)
        videos.append(to_model_range(clip))
        backgrounds.append(torch.tensor(BACKGROUNDS[scene.background]) / 127.5 - 1)
    return torch.stack(videos), torch.stack(backgrounds)


def phase_at(config: VaeConfig, step: int) -> VaePhase:
    """The phase that a step belongs to."""
    ends = accumulate(phase.steps for phase in config.phases)
    return next(phase for phase, end in zip(config.phases, ends, strict=True) if step < end)


def vae_loss(vae: AutoencoderKLWan, config: VaeConfig, step: RecipeStep) -> Tensor:
    """Reconstruction error, counted more around shapes, plus a weak pull of latents to zero."""
    device = next(vae.parameters()).device
    video, background = (x.to(device) for x in draw_crops(phase_at(config, step.number), step.rng))
    distance = (video - background[:, :, None, None, None]).abs().amax(1, keepdim=True)
    near_shape = F.max_pool3d((distance > 0.1).float(), (1, 5, 5), stride=1, padding=(0, 2, 2))
    with autocast(device):
        mean = encode_mean(vae, video)
        noise = torch.randn(mean.shape, generator=step.generator).to(device)
        rebuilt = decode_open(vae, mean + config.latent_noise * noise)
    error = rebuilt.float() - video
    weight = 1 + config.foreground_weight * near_shape
    penalty = 0.5 * mean.float().square().mean()
    return ((error.abs() + error.square()) * weight).mean() + config.latent_penalty * penalty


def is_hidden_convolution(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon takes a parameter of the VAE: kernels, but not those at its outer ends."""
    ends = ("encoder.conv_in", "decoder.conv_out", "quant_conv", "encoder.conv_out")
    return parameter.ndim >= 4 and not any(end in name for end in ends)


@dataclass(frozen=True)
class LatentSet:
    """Encoded clips.

    Attributes:
        latents: Normalised, float16 [clips, channels, latent frames, height / 8, width / 8].
        scenes: The scene of each clip.
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
    device = next(vae.parameters()).device
    with autocast(device):
        latents = encode_mean(vae, videos.to(device))
    return ((latents.float().cpu() - mean) / deviation).half()


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

    Scenes are `centred`, so that few are distinct; each of those is encoded once.

    Args:
        vae: The trained VAE.
        folder: Folder of `latents-<frames>x<size>-<clips>.safetensors`.
        clips: Number of scenes that are drawn.
        frames: Frames of a clip, 4 n + 1.
        size: Height and width in pixels.
        seed: Seed of the scenes.
        on_progress: Called with the clips that are done.
    """
    rng = random.Random(f"{seed} clips {frames} {size}")
    drawn = (centred(sample_scene(rng.getrandbits(40))) for _ in range(clips))
    scenes = list(dict.fromkeys(drawn))
    path = folder / f"latents-{frames}x{size}-{clips}.safetensors"
    if not path.exists():
        batch = max(1, 32 * 64 * 64 // (size * size))
        parts = []
        for start in range(0, len(scenes), batch):
            parts.append(_encode(vae, scenes[start : start + batch], frames, size))
            on_progress("encode", min(start + batch, len(scenes)), len(scenes))
        with whole_file(path) as temporary:
            save_file({"latents": torch.cat(parts)}, temporary)
    return LatentSet(load_file(path)["latents"], scenes)
