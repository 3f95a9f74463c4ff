"""Images as the reference prepares them for the VAE and for the image tower."""

from typing import TYPE_CHECKING, Any

import torch
from diffusers.video_processor import VideoProcessor
from transformers import BaseImageProcessor, BatchFeature

if TYPE_CHECKING:
    from PIL import Image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def to_unit_tensor(image: "Image.Image | torch.Tensor") -> torch.Tensor:
    """An RGB image as float32 [1, 3, height, width] in -1..1; tensors pass as they are."""
    if isinstance(image, torch.Tensor):
        return image if image.ndim == 4 else image[None]
    import numpy as np

    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]
    return pixels.float() / 255 * 2 - 1


def resize_bicubic(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bicubic without antialiasing, aspect not kept (Wan2.1 image2video.py, clip.py)."""
    return torch.nn.functional.interpolate(
        image, size=(height, width), mode="bicubic", align_corners=False
    )


class WanVideoProcessor(VideoProcessor):
    """Resizes the first frame as the reference does; diffusers' own uses Lanczos."""

    def preprocess(  # type: ignore[override]
        self, image: Any, height: int, width: int, **_: Any
    ) -> torch.Tensor:
        """An image as float32 [1, 3, height, width], about -1..1 (bicubic may overshoot)."""
        return resize_bicubic(to_unit_tensor(image), height, width)


class WanImageProcessor(BaseImageProcessor):
    """The image tower's input: squeezed to a square and normalised, nothing cropped."""

    def __init__(self, image_size: int = 224, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.image_size = image_size

    def __call__(  # type: ignore[override]
        self, images: Any, return_tensors: str = "pt", **_: Any
    ) -> BatchFeature:
        """``pixel_values`` float32 [images, 3, size, size] of one image or a list."""
        batch = images if isinstance(images, (list, tuple)) else [images]
        size = self.image_size
        pixels = torch.cat([resize_bicubic(to_unit_tensor(i), size, size) for i in batch])
        mean = torch.tensor(CLIP_MEAN).view(1, 3, 1, 1)
        std = torch.tensor(CLIP_STD).view(1, 3, 1, 1)
        return BatchFeature({"pixel_values": (pixels * 0.5 + 0.5 - mean) / std})


def clip_processor(image_size: int) -> WanImageProcessor:
    """The processor for a tower of ``image_size`` pixels."""
    return WanImageProcessor(image_size)
