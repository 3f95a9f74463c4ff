"""What the transformer draws, the ideal video nearest to it, and the step that learns from both.

In training a transformer sees noise on true videos only. When it draws, it sees what it has drawn
so far, and a shape that has gone wrong at a high noise level stays wrong. Here it sees noise on
its own videos, and its target is the ideal one: to correct what does not fit the caption.
"""

import json
import random
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nabla_attn import apply
from nabla_attn.files import whole_file
from nabla_attn.moving_shapes.ideal import draw_twin, nearest_ideal
from nabla_attn.moving_shapes.loop import RecipeStep, autocast
from nabla_attn.moving_shapes.recipe import CorrectionPhase
from nabla_attn.moving_shapes.scene import (
    HELD_OUT,
    describe,
    parse_caption,
    sample_scene,
    write_caption,
)
from nabla_attn.moving_shapes.transformer import CaptionEncoder
from nabla_attn.moving_shapes.vae import encode_mean, latent_scale, to_model_range
from nabla_attn.progress import ProgressCallback, ignore_progress
from nabla_attn.training.noise import NUM_TRAIN_TIMESTEPS, add_noise, shift_levels

WINDOWS = (6, 8, 8, 16)
"""Latent frames of a step, one of these at random: parts of a video cost less and teach as much
about outlines."""

FOREGROUND = 3.0
"""Further weight of tokens near the shape, drawn or ideal."""

EMPTY_SHARE = 0.1
"""Share of the captions left empty, for guidance."""

FULL_LEVEL = 0.8
"""Noise level below which an error counts less: a velocity's is that of the video over the level,
which would let low levels outweigh all others."""


@dataclass(frozen=True)
class Correction:
    """A drawn video and the ideal one, as normalised latents.

    Attributes:
        drawn: float16 [channels, latent frames, rows, columns].
        ideal: Of the same shape.
        near: Tokens near either shape, bool [latent frames, rows, columns].
        caption: What both should show.
    """

    drawn: Tensor
    ideal: Tensor
    near: Tensor
    caption: str


def draw_corrections(
    pipeline: Any,
    phase: CorrectionPhase,
    folder: Path,
    seed: int,
    on_progress: ProgressCallback = ignore_progress,
) -> list[Correction]:
    """Let the model draw videos of training captions, and find the ideal ones and some twins.

    Every video is a file of its own, so that an interrupted run goes on where it stopped.

    Args:
        pipeline: The model as it is before the phase.
        phase: The phase.
        folder: Folder of the files.
        seed: The recipe's seed.
        on_progress: Called with the videos that are done.

    Raises:
        ValueError: No video shows anything like what its caption says.
    """
    corrections: list[Correction] = []
    for index in range(phase.videos):
        path = folder / f"{index:05d}.safetensors"
        if not path.exists():
            _write(path, _draw_one(pipeline, phase, random.Random(f"{seed} {phase.name} {index}")))
        corrections += _read(path)
        on_progress("draw", index + 1, phase.videos)
    if not corrections:
        raise ValueError(
            f"{phase.name}: none of {phase.videos} videos shows anything like what its caption "
            "says. Train the phases before longer."
        )
    return corrections


@torch.no_grad()
def _draw_one(pipeline: Any, phase: CorrectionPhase, rng: random.Random) -> list[Correction]:
    scene = sample_scene(rng.getrandbits(40))
    caption = describe(scene, rng)
    algorithm = rng.choice(("dense", *phase.algorithms))
    with _attention(pipeline.transformer, algorithm):
        latents = pipeline(
            caption,
            height=phase.size,
            width=phase.size,
            num_frames=phase.frames,
            num_inference_steps=rng.choice(phase.draw_steps),
            guidance_scale=rng.choice(phase.draw_guidance),
            generator=torch.Generator().manual_seed(rng.getrandbits(63)),
            output_type="latent",
        ).frames
    vae = pipeline.vae
    mean, deviation = latent_scale(vae)
    decoded = vae.decode((latents.float() * deviation + mean).to(vae.dtype)).sample[0]
    pixels = ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    video = pixels.permute(1, 2, 3, 0).cpu().numpy()
    words = parse_caption(caption)
    ideal = nearest_ideal(video, words)
    if ideal is None:
        return []
    found = [Correction(latents[0].half(), _encode(vae, ideal), _near(video, ideal), caption)]
    ground = ideal[0, 0, 0].astype(np.float32)
    for _ in range(phase.twins):
        twin = draw_twin(ideal, words, rng)
        twin_words = twin.of_words(words)
        shape = twin_words.shapes[0]
        if (shape.colour, shape.kind, shape.direction) in HELD_OUT:
            continue
        videos = [twin.of_video(each, words, ground) for each in (video, ideal)]
        drawn, right = (_encode(vae, each) for each in videos)
        found.append(Correction(drawn, right, _near(*videos), write_caption(twin_words)))
    return found


def _encode(vae: Any, video: NDArray[np.uint8]) -> Tensor:
    mean, deviation = latent_scale(vae)
    latents = encode_mean(vae, to_model_range(np.ascontiguousarray(video))[None].to(vae.dtype))
    return ((latents.float() - mean) / deviation)[0].half()


def _near(drawn: NDArray[np.uint8], ideal: NDArray[np.uint8]) -> Tensor:
    """Tokens within one of a shape: bool [latent frames, rows, columns]."""
    ground = ideal[0, 0, 0].astype(np.float32)
    seen = np.maximum(*(np.abs(video - ground).max(-1) for video in (drawn, ideal))) > 20
    tokens = F.max_pool2d(torch.from_numpy(seen).float()[:, None], 8)
    around = F.max_pool2d(tokens, 3, stride=1, padding=1)[:, 0] > 0
    later = around[1:].unflatten(0, (-1, 4)).any(1) if len(around) > 1 else around[1:]
    return torch.cat([around[:1], later])


def _attention(model: Any, algorithm: str) -> Any:
    return nullcontext() if algorithm == "dense" else apply(model, algorithm)


def _write(path: Path, corrections: list[Correction]) -> None:
    tensors: dict[str, Tensor] = {}
    for index, each in enumerate(corrections):
        parts = {"drawn": each.drawn, "ideal": each.ideal, "near": each.near}
        tensors |= {f"{index}.{name}": part.contiguous() for name, part in parts.items()}
    captions = json.dumps([each.caption for each in corrections])
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata={"captions": captions})


def _read(path: Path) -> Iterator[Correction]:
    with safe_open(path, "pt") as file:
        for index, caption in enumerate(json.loads(file.metadata()["captions"])):
            drawn, ideal, near = (
                file.get_tensor(f"{index}.{name}") for name in ("drawn", "ideal", "near")
            )
            yield Correction(drawn, ideal, near, caption)


@dataclass(frozen=True)
class _Sample:
    """One sample of a step; tensors have a batch of 1."""

    noisy: Tensor
    level: Tensor
    caption: str
    ideal: Tensor
    near: Tensor
    importance: float


class CorrectionLoss:
    """The loss of a correction phase.

    Most samples are noisy drawn videos, and their target is the velocity that leads to the ideal
    one. A share are noisy ideal videos, as in ordinary training, and a share learn at the first
    levels what the model predicted with guidance before the phase.

    Args:
        model: The transformer that learns.
        teacher: The transformer as it was; only asked where the phase has such samples.
        corrections: What to learn from.
        text: Encoder of the captions.
        phase: The phase.
    """

    def __init__(
        self,
        model: Any,
        teacher: Any,
        corrections: list[Correction],
        text: CaptionEncoder,
        phase: CorrectionPhase,
    ) -> None:
        self._model, self._teacher, self._text = model, teacher, text
        self._corrections, self._phase = corrections, phase
        self._device = next(model.parameters()).device

    def __call__(self, step: RecipeStep) -> Tensor:
        """Mean squared error of the velocity over the samples of a step."""
        samples = range(self._phase.batch)
        return torch.stack([self._sample_loss(step) for _ in samples]).mean()

    def _sample_loss(self, step: RecipeStep) -> Tensor:
        is_guided = step.rng.random() < self._phase.guided_share
        sample = self._draw(step, is_guided)
        length = sample.noisy.shape[2]
        algorithms = self._phase.algorithms
        algorithm = "dense" if length < max(WINDOWS) // 2 else step.rng.choice(algorithms)
        with _attention(self._model, algorithm):
            predicted = self._predict(self._model, sample, sample.caption)
        to_ideal = (sample.noisy - sample.ideal) / sample.level
        goal = self._guided(sample) if is_guided else to_ideal
        error = (predicted - goal).square().mean(1)
        weight = 1 + FOREGROUND * sample.near
        return sample.importance * (error * weight).sum() / weight.sum()

    def _draw(self, step: RecipeStep, is_guided: bool) -> _Sample:
        rng, phase = step.rng, self._phase
        chosen = rng.choice(self._corrections)
        part = _window(rng, chosen.ideal.shape[1])
        ideal, drawn = chosen.ideal[None, :, part].float(), chosen.drawn[None, :, part].float()
        is_plain = not is_guided and rng.random() < phase.plain_share
        if is_plain:
            drawn = ideal
        elif rng.random() < phase.mild_share:
            drawn = torch.lerp(ideal, drawn, phase.mildness)
        if is_plain:
            level = float(shift_levels(torch.tensor(rng.random()), phase.shift))
        else:
            level = rng.choice(phase.guided_levels) if is_guided else _level(phase, rng)
        is_empty = not is_guided and rng.random() < EMPTY_SHARE
        sigma = torch.tensor([level])
        noise = torch.randn(ideal.shape, generator=step.generator)
        return _Sample(
            noisy=add_noise(drawn, noise, sigma).to(self._device),
            level=sigma.to(self._device),
            caption="" if is_empty else chosen.caption,
            ideal=ideal.to(self._device),
            near=chosen.near[None, part].to(self._device),
            importance=1.0 if is_plain else min(1.0, level / FULL_LEVEL) ** 2,
        )

    def _predict(self, model: Any, sample: _Sample, caption: str) -> Tensor:
        with autocast(self._device):
            velocity = model(
                sample.noisy,
                timestep=sample.level * NUM_TRAIN_TIMESTEPS,
                encoder_hidden_states=self._text([caption]).to(self._device),
                return_dict=False,
            )[0]
        return velocity.float()

    @torch.no_grad()
    def _guided(self, sample: _Sample) -> Tensor:
        """The teacher's velocity with guidance."""
        with_text, without = (
            self._predict(self._teacher, sample, caption) for caption in (sample.caption, "")
        )
        return without + self._phase.guidance * (with_text - without)


def _window(rng: random.Random, frames: int) -> slice:
    """Some latent frames of a video, often its first ones."""
    length = min(rng.choice(WINDOWS), frames)
    start = rng.choice((0, rng.randint(0, frames - length)))
    return slice(start, start + length)


def _level(phase: CorrectionPhase, rng: random.Random) -> float:
    """A noise level of the sampler, later ones more often, or any that outlines depend on."""
    if rng.random() < 0.25:
        return rng.uniform(0.5, 0.97)
    return rng.choice([level for first in range(3) for level in phase.levels[first:]])
