"""Image and video files as the arguments of the pipeline of each task."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_IMAGE_PIXELS = 2**28


def read_image(path: str | Path) -> "Image":
    """An image file as RGB.

    Raises:
        ValueError: it is no image, or far too large.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise ValueError(f"{path}: {image.width}x{image.height} pixels are too many.")
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no readable image ({error}).") from error


def read_inputs(files: dict[str, str], frames: int) -> dict[str, Any]:
    """Files given by flag as arguments of the pipeline call.

    Args:
        files: flag name to file; ``src_ref_images`` is a list separated by commas.
        frames: frames of the video to make; a source video must have as many.

    Raises:
        ValueError: a file is no image or video, or a video is too short.
    """
    inputs: dict[str, Any] = {}
    for flag, argument in (
        ("image", "image"),
        ("first_frame", "image"),
        ("last_frame", "last_image"),
    ):
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

    from nabla_attn.generation.video import read_video

    video = read_video(path, limit=frames)
    if len(video) < frames:
        raise ValueError(
            f"--{flag}: {path} has {len(video)} frames, the video to make {frames}. Pass a longer "
            "one or a smaller --frame_num."
        )
    return [Image.fromarray(frame) for frame in video]


def aspect_of(inputs: dict[str, Any]) -> float | None:
    """Height / width of the first image, which the video follows; None without one."""
    image = inputs.get("image")
    return None if image is None else image.height / image.width
