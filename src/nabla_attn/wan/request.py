"""A run of the reference's command: flags as given, and as they are after its defaults."""

import math
import secrets
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nabla_attn.wan.tasks import (
    DEFAULT_SIZE,
    DEFAULT_TASK,
    INPUT_FLAGS,
    find_task,
    parse_size,
)

# The reference cuts latents to multiples of 16 when sparse (Wan2.1-NABLA text2video.py:176-179).
CROP_LATENTS = 16
MAX_SEED = 2**63


@dataclass(frozen=True)
class WanRequest:
    """What to generate from a Wan checkpoint. ``None`` takes the task's default.

    Attributes:
        ckpt_dir: original checkpoint or diffusers directory.
        prompt: the text.
        task: a key of ``tasks.TASKS``.
        size: WIDTH*HEIGHT; with an input image its area, as the image gives the aspect.
        frames: video frames, 4n+1.
        steps: denoising steps.
        shift: of the noise schedule.
        guidance: classifier-free guidance scale.
        solver: ``"unipc"`` or ``"dpm++"``.
        seed: below 0 draws one.
        negative_prompt: None is the task's own.
        sparse_algo: None is the checkpoint's own, else dense.
        crop_to_blocks: cut the size down to whole blocks, as the reference does when sparse.
        inputs: flag name to file, for the flags in ``tasks.INPUT_FLAGS``.
    """

    ckpt_dir: Path
    prompt: str
    task: str = DEFAULT_TASK
    size: str = DEFAULT_SIZE
    frames: int | None = None
    steps: int | None = None
    shift: float | None = None
    guidance: float | None = None
    solver: str = "unipc"
    seed: int = -1
    negative_prompt: str | None = None
    sparse_algo: str | None = None
    crop_to_blocks: bool = False
    inputs: dict[str, str] = field(default_factory=dict)

    def resolved(self) -> "WanRequest":
        """The same request with every default filled in.

        Raises:
            ValueError: an unknown task or solver, a value the task cannot take, an input file that
                is missing. The message says what to pass.
        """
        task = find_task(self.task)
        width, height = parse_size(self.size)
        frames = task.frames if self.frames is None else self.frames
        _check_frames(self.task, frames)
        _check_inputs(self.task, self.inputs)
        if not self.prompt or not self.prompt.strip():
            raise ValueError("no prompt. Pass --prompt TEXT.")
        if f"{width}*{height}" not in task.sizes:
            warnings.warn(
                f"{self.task} was trained for {', '.join(task.sizes)}; {width}*{height} may look "
                "worse.",
                stacklevel=2,
            )
        return replace(
            self,
            size=f"{width}*{height}",
            frames=frames,
            steps=_positive("sample_steps", task.steps if self.steps is None else self.steps),
            shift=task.shift_for((width, height)) if self.shift is None else self.shift,
            guidance=task.guidance if self.guidance is None else self.guidance,
            seed=self.seed if self.seed >= 0 else secrets.randbelow(MAX_SEED),
            negative_prompt=(
                task.negative_prompt if self.negative_prompt is None else self.negative_prompt
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for a record."""
        return {**self.__dict__, "ckpt_dir": str(self.ckpt_dir), "inputs": dict(self.inputs)}


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")
    return value


def _check_frames(task: str, frames: int) -> None:
    if task.startswith("t2i") and frames != 1:
        raise ValueError(f"{task} makes one image: frame_num must be 1, got {frames}.")
    if frames < 1 or frames % 4 != 1:
        below = max(1, (frames - 1) // 4 * 4 + 1)
        raise ValueError(f"frame_num must be 4n+1, got {frames}. Nearest: {below} or {below + 4}.")


def _check_inputs(task: str, inputs: dict[str, str]) -> None:
    allowed = find_task(task)
    for name in allowed.flags:
        if not inputs.get(name):
            raise ValueError(f"{task} needs --{name} FILE.")
    known = (*allowed.flags, *allowed.optional_flags)
    for name, value in inputs.items():
        assert name in INPUT_FLAGS
        if name not in known:
            takes = ", ".join(f"--{flag}" for flag in known) or "none"
            raise ValueError(f"{task} takes no --{name}. Its input flags: {takes}.")
        for path in value.split(",") if name == "src_ref_images" else [value]:
            if not Path(path).is_file():
                raise ValueError(f"--{name}: no such file: {path}.")
    if task.startswith("vace") and inputs.get("src_mask") and not inputs.get("src_video"):
        raise ValueError("--src_mask marks parts of a video. Pass --src_video FILE too.")


def video_size(
    size: str, *, unit: int, latent_pixels: int, crop: bool = False, aspect: float | None = None
) -> tuple[int, int]:
    """Width and height of the video in pixels.

    Args:
        size: WIDTH*HEIGHT as asked for.
        unit: pixels of one token; every size is a multiple.
        latent_pixels: pixels of one latent.
        crop: cut down to multiples of 16 latents.
        aspect: height / width of the input image; then ``size`` gives the area only
            (Wan2.1 image2video.py).

    Raises:
        ValueError: no multiple of ``unit``, or nothing is left.
    """
    width, height = parse_size(size)
    if aspect is not None:
        area = width * height
        height = int(math.sqrt(area * aspect) // unit) * unit
        width = int(math.sqrt(area / aspect) // unit) * unit
    if crop:
        step = CROP_LATENTS * latent_pixels
        width, height = width // step * step, height // step * step
    if not width or not height:
        raise ValueError(f"size {size} leaves nothing after cutting it to whole blocks.")
    for name, value in (("width", width), ("height", height)):
        if value % unit:
            below = value // unit * unit
            nearest = f"{below} or {below + unit}" if below else f"{unit}"
            raise ValueError(
                f"{name} {value} of size {size} is no multiple of {unit}. Nearest: {nearest}."
            )
    return width, height
