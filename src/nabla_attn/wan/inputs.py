"""Image and video files as the arguments of the pipeline of each task."""

from typing import TYPE_CHECKING, Any

from nabla_attn.media import read_image, read_video

if TYPE_CHECKING:
    from PIL.Image import Image


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
