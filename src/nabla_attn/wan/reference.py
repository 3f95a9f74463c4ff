"""Where the reference's numbers differ from diffusers': noise levels, and images for the VAE and
the image tower.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from diffusers.video_processor import VideoProcessor
from transformers import BaseImageProcessor, BatchFeature

from nabla_attn.wan.tasks import SOLVERS

if TYPE_CHECKING:
    from PIL import Image

NUM_TRAIN_TIMESTEPS = 1000
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def flow_sigmas(num_steps: int, shift: float, first: float) -> np.ndarray:
    """Noise levels of `num_steps` steps in float64, without the final zero.

    Args:
        num_steps: Number of steps.
        shift: Shift of the schedule; a larger one spends more steps at high noise.
        first: The level before shifting: 0.999 for UniPC, 1 for DPM++ (Wan2.1
            wan/utils/fm_solvers_unipc.py and fm_solvers.py).
    """
    if num_steps < 1:
        raise ValueError(f"sampling needs at least one step, got {num_steps}.")
    if not 0 < shift < float("inf"):
        raise ValueError(f"shift must be positive, got {shift}.")
    sigmas = np.linspace(first, 0, num_steps + 1)[:-1]
    return shift * sigmas / (1 + (shift - 1) * sigmas)


class WanUniPCScheduler(UniPCMultistepScheduler):
    """UniPC whose noise levels start at 0.999 before shifting; diffusers starts at 1."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **_: Any) -> None:
        """Set the timesteps of `num_inference_steps` steps."""
        super().set_timesteps(num_inference_steps, device=device)  # type: ignore[misc]
        _set_levels(self, num_inference_steps, device, 0.999)


class WanDPMScheduler(DPMSolverMultistepScheduler):
    """DPM++ whose noise levels run from 1 to 0; diffusers starts at 0.999 and takes no own."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **_: Any) -> None:
        """Set the timesteps of `num_inference_steps` steps."""
        super().set_timesteps(num_inference_steps, device=device)  # type: ignore[misc]
        _set_levels(self, num_inference_steps, device, 1.0)


def _set_levels(scheduler: Any, num_steps: int, device: Any, first: float) -> None:
    """Put the reference's levels in; timesteps are 1000 sigma in float64, truncated."""
    sigmas = flow_sigmas(num_steps, scheduler.config.flow_shift, first)
    timesteps = (sigmas * NUM_TRAIN_TIMESTEPS).astype(np.int64)
    scheduler.timesteps = torch.from_numpy(timesteps).to(device)
    scheduler.sigmas = torch.from_numpy(np.append(sigmas, 0.0).astype(np.float32))


def build_solver(solver: str, shift: float) -> Any:
    """The scheduler of diffusers for `solver` (`"unipc"` or `"dpm++"`), as the reference runs it.

    Raises:
        ValueError: The solver is unknown, or the shift is not positive.
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}. Known: {', '.join(SOLVERS)}.")
    flow_sigmas(1, shift, 1.0)
    common: dict[str, Any] = {
        "num_train_timesteps": NUM_TRAIN_TIMESTEPS,
        "solver_order": 2,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": shift,
    }
    if solver == "unipc":
        return WanUniPCScheduler(solver_type="bh2", **common)
    return WanDPMScheduler(algorithm_type="dpmsolver++", solver_type="midpoint", **common)


def to_unit_tensor(image: "Image.Image | torch.Tensor") -> torch.Tensor:
    """An image as float32 [1, 3, height, width] from -1 to 1; tensors pass as they are."""
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
        """One image or a list as `pixel_values`, float32 [images, 3, size, size]."""
        batch = images if isinstance(images, (list, tuple)) else [images]
        size = self.image_size
        pixels = torch.cat([resize_bicubic(to_unit_tensor(i), size, size) for i in batch])
        mean = torch.tensor(CLIP_MEAN).view(1, 3, 1, 1)
        std = torch.tensor(CLIP_STD).view(1, 3, 1, 1)
        return BatchFeature({"pixel_values": (pixels * 0.5 + 0.5 - mean) / std})
