"""A run of the reference's command: its flags, their defaults by task, and the files they name."""

import math
import secrets
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nabla_attn.generation.request import check_text
from nabla_attn.media import read_image, read_video
from nabla_attn.wan.tasks import (
    DEFAULT_SIZE,
    DEFAULT_TASK,
    INPUT_FLAGS,
    SOLVERS,
    find_task,
    width_and_height,
)

if TYPE_CHECKING:
    from PIL.Image import Image

# The reference cuts latents to multiples of 16 when sparse (Wan2.1-NABLA text2video.py:176-179).
CROP_LATENTS = 16
MAX_SEED = 2**63


@dataclass(frozen=True)
class WanRequest:
    """A video or image to make from a Wan checkpoint. `None` takes the task's default.

    Attributes:
        ckpt_dir: The original checkpoint or diffusers directory.
        prompt: The text.
        task: A key of `tasks.TASKS`.
        size: WIDTH*HEIGHT; with an input image its area, as the image gives the aspect.
        frames: Number of video frames, 4n+1.
        steps: Number of denoising steps.
        shift: Shift of the noise schedule.
        guidance: Scale of classifier-free guidance.
        solver: `"unipc"` or `"dpm++"`.
        seed: Seed of the noise; below 0 draws one.
        negative_prompt: The text that guidance steers away from; None is the task's own.
        sparse_algo: The algorithm; None is the checkpoint's own, else dense.
        crop_to_blocks: Whether to cut the size down to whole blocks, as the reference does when
            sparse.
        inputs: Files by flag, for the flags in `tasks.INPUT_FLAGS`.
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
            ValueError: The task or solver is unknown, a value is not one that the task takes, or an
                input file is missing. The message says what to pass.
        """
        task = find_task(self.task)
        width, height = width_and_height(self.size)
        frames = task.frames if self.frames is None else self.frames
        _check_frames(self.task, frames)
        _check_inputs(self.task, self.inputs)
        if not self.prompt or not self.prompt.strip():
            raise ValueError("no prompt. Pass --prompt TEXT.")
        if self.solver not in SOLVERS:
            raise ValueError(f"unknown solver {self.solver!r}. Known: {', '.join(SOLVERS)}.")
        if f"{width}*{height}" not in task.sizes:
            warnings.warn(
                f"{self.task} was trained for {', '.join(task.sizes)}; {width}*{height} may look "
                "worse.",
                stacklevel=2,
            )
        guidance = task.guidance if self.guidance is None else self.guidance
        return replace(
            self,
            prompt=check_text(self.prompt, "prompt"),
            size=f"{width}*{height}",
            frames=frames,
            steps=_positive("sample_steps", task.steps if self.steps is None else self.steps),
            shift=task.shift_for((width, height)) if self.shift is None else self.shift,
            guidance=guidance,
            seed=self.seed if self.seed >= 0 else secrets.randbelow(MAX_SEED),
            negative_prompt=self._negative_prompt(guidance, task.negative_prompt),
        )

    def _negative_prompt(self, guidance: float, default: str) -> str:
        """The negative prompt that is read: none at all without guidance."""
        if guidance > 1:
            given = default if self.negative_prompt is None else self.negative_prompt
            return check_text(given, "negative prompt")
        if self.negative_prompt:
            warnings.warn(
                f"--negative_prompt is ignored at guidance {guidance:g}: nothing steers away from "
                "it. Pass --sample_guide_scale above 1.",
                stacklevel=3,
            )
        return ""

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
        unit: Pixels of one token; every size is a multiple.
        latent_pixels: Pixels of one latent.
        crop: Whether to cut down to multiples of 16 latents.
        aspect: Height / width of the input image; then `size` gives the area only (Wan2.1
            image2video.py).

    Raises:
        ValueError: The size is no multiple of `unit`, or nothing is left of it.
    """
    width, height = width_and_height(size)
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


def read_inputs(files: dict[str, str], frames: int) -> dict[str, Any]:
    """Read the files of the input flags as arguments of the pipeline's call.

    Args:
        files: Files by flag; `src_ref_images` is a list separated by commas.
        frames: Number of frames of the video to make; a source video must have as many.

    Raises:
        ValueError: A file is no image or video, or a video is too short.
    """
    inputs: dict[str, Any] = {}
    images = {"image": "image", "first_frame": "image", "last_frame": "last_image"}
    for flag, argument in images.items():
        if flag in files:
            inputs[argument] = read_image(files[flag])
    for flag, argument in (("src_video", "video"), ("src_mask", "mask")):
        if flag in files:
            inputs[argument] = _read_frames(files[flag], frames, flag)
    if "src_ref_images" in files:
        inputs["reference_images"] = [read_image(p) for p in files["src_ref_images"].split(",")]
    return inputs


def _read_frames(path: str, frames: int, flag: str) -> list["Image"]:
    from PIL import Image

    video = read_video(path, limit=frames + 1)
    if len(video) < frames:
        raise ValueError(
            f"--{flag}: {path} has {len(video)} frames, the video to make {frames}. Pass a longer "
            "one or a smaller --frame_num."
        )
    if len(video) > frames:
        warnings.warn(f"--{flag}: of {path} only the first {frames} frames are used.", stacklevel=3)
    return [Image.fromarray(frame) for frame in video[:frames]]


def aspect_of(inputs: dict[str, Any]) -> float | None:
    """Height / width of the first image, which the video follows; None without one."""
    image = inputs.get("image")
    return None if image is None else image.height / image.width


def fit_inputs(inputs: dict[str, Any], size: tuple[int, int], unit: int) -> tuple[int, int]:
    """Bring the source video to a size that the model takes, and warn of every change of shape.

    Args:
        inputs: Arguments of the pipeline's call; the source video in them is replaced.
        size: Width and height of the video to make.
        unit: Pixels of one token.

    Returns:
        Width and height of the video: those of the source video, made to fit into the area of
        `size` and cut down to whole tokens, or `size` itself without one.
    """
    last, video = inputs.get("last_image"), inputs.get("video")
    if last is not None and abs(last.height / last.width / (aspect_of(inputs) or 1) - 1) > 0.01:
        warnings.warn(
            f"--last_frame has {last.width}x{last.height} pixels, not the shape of --first_frame; "
            f"it is squeezed to {size[0]}x{size[1]}.",
            stacklevel=3,
        )
    if video is None:
        return size
    width, height = video[0].size
    if width * height > size[0] * size[1]:
        scale = min(size[0] / width, size[1] / height)
        width, height = int(width * scale), int(height * scale)
    size = max(width // unit, 1) * unit, max(height // unit, 1) * unit
    if size != video[0].size:
        warnings.warn(
            f"--src_video has {video[0].width}x{video[0].height} pixels; it is resized to "
            f"{size[0]}x{size[1]}, and so is the video to make.",
            stacklevel=3,
        )
        inputs["video"] = [frame.resize(size, resample=1) for frame in video]
    mask = inputs.get("mask")
    if mask is not None and mask[0].size != video[0].size:
        warnings.warn(
            f"--src_mask has {mask[0].width}x{mask[0].height} pixels and --src_video "
            f"{video[0].width}x{video[0].height}; the mask is resized.",
            stacklevel=3,
        )
    return size
