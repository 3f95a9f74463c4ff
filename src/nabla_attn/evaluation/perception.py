"""How videos look to networks, from local weights: LPIPS and CLIP scores; nothing is downloaded.

Save the weights of LPIPS once, where the `lpips` package is installed:
`torch.save(lpips.LPIPS(net="alex").state_dict(), "lpips_alex.pt")`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nabla_attn.files import read_object
from nabla_attn.generation.video import check_frames

# (name in the state dict, in, out, kernel, stride, padding), a pooling before the 2nd and 3rd
CONVOLUTIONS = (
    ("slice1.0", 3, 64, 11, 4, 2),
    ("slice2.3", 64, 192, 5, 1, 2),
    ("slice3.6", 192, 384, 3, 1, 1),
    ("slice4.8", 384, 256, 3, 1, 1),
    ("slice5.10", 256, 256, 3, 1, 1),
)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""What AlexNet's inputs in [-1, 1] are normalised by."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of OpenAI's CLIP, for directories without a preprocessor_config.json."""

MIN_SIDE = 63  # pixels; smaller pictures vanish in the poolings
BATCH = 16  # frames


class LPIPS(nn.Module):
    """LPIPS of pictures, version 0.1 with AlexNet: 0 for the same, about 1 for unrelated ones.

    Args:
        path: The state dict of `lpips.LPIPS(net="alex")`.

    Raises:
        ValueError: The file cannot be read or holds other weights.

    Source: Zhang et al., arXiv:1801.03924; the layers of torchvision's AlexNet.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(inner, outer, kernel, stride, padding)
            for _, inner, outer, kernel, stride, padding in CONVOLUTIONS
        )
        self.weights = nn.ParameterList(
            torch.zeros(1, outer, 1, 1) for _, _, outer, *_ in CONVOLUTIONS
        )
        self.register_buffer("shift", torch.tensor(SHIFT)[None, :, None, None])
        self.register_buffer("scale", torch.tensor(SCALE)[None, :, None, None])
        self._load(Path(path))
        self.eval().requires_grad_(False)

    def forward(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """Distances [batch] of pictures [batch, 3, height, width] in [-1, 1].

        Raises:
            ValueError: Values outside [-1, 1]: other ranges give plausible, wrong numbers.
        """
        for pictures in (ours, theirs):
            if pictures.abs().max() > 1 + 1e-4:
                raise ValueError(
                    "LPIPS takes pictures in [-1, 1], got values up to "
                    f"{pictures.abs().max().item():g}."
                )
        total = ours.new_zeros(len(ours))
        for weight, a, b in zip(
            self.weights, self._features(ours), self._features(theirs), strict=True
        ):
            total += (weight * (_normalise(a) - _normalise(b)) ** 2).sum(1).mean(dim=(1, 2))
        return total

    def _features(self, x: Tensor) -> list[Tensor]:
        x = (x - self.shift) / self.scale
        features = []
        for index, convolution in enumerate(self.convolutions):
            if index in (1, 2):
                x = nn.functional.max_pool2d(x, 3, 2)
            x = convolution(x).relu()
            features.append(x)
        return features

    def _load(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            for index, (name, *_) in enumerate(CONVOLUTIONS):
                convolution = self.convolutions[index]
                for part in ("weight", "bias"):
                    _copy(getattr(convolution, part), state[f"net.{name}.{part}"])
                _copy(self.weights[index], state[f"lin{index}.model.1.weight"])
        except Exception as error:
            raise ValueError(
                f"{path}: not the weights of lpips.LPIPS(net='alex') ({error})."
            ) from error


def measure_lpips(model: LPIPS, frames: np.ndarray, reference: np.ndarray) -> list[float]:
    """LPIPS of every frame.

    Args:
        model: The network.
        frames: uint8 [frames, height, width, 3].
        reference: The same shape.

    Raises:
        ValueError: Frames smaller than 63 pixels.
    """
    if min(check_frames(frames).shape[1:3]) < MIN_SIDE:
        raise ValueError(f"LPIPS needs {MIN_SIDE} pixels a side, got {list(frames.shape[1:3])}.")
    distances: list[float] = []
    for start in range(0, len(frames), BATCH):
        ours, theirs = (
            torch.from_numpy(video[start : start + BATCH]).permute(0, 3, 1, 2).float() / 127.5 - 1
            for video in (frames, reference)
        )
        distances += model(ours, theirs).tolist()
    return distances


class ClipScore:
    """100 x cosine of prompt and frame, mean over frames, as CLIPScore without its factor 2.5.

    Args:
        directory: A CLIP model with its tokenizer, as transformers saves them.

    Raises:
        ValueError: It cannot be loaded.

    Source: Hessel et al., arXiv:2104.08718.
    """

    def __init__(self, directory: str | Path) -> None:
        from transformers import CLIPModel, CLIPTokenizerFast

        try:
            self._model = CLIPModel.from_pretrained(
                directory, local_files_only=True, use_safetensors=True, dtype=torch.float32
            ).eval()
            self._tokenizer = CLIPTokenizerFast.from_pretrained(directory, local_files_only=True)
        except Exception as error:
            raise ValueError(f"{directory}: cannot load a CLIP model ({error}).") from error
        config = Path(directory) / "preprocessor_config.json"
        values = read_object(config) if config.is_file() else {}
        self._mean = _channels(values.get("image_mean", CLIP_MEAN), config)
        self._std = _channels(values.get("image_std", CLIP_STD), config)
        self._size = int(self._model.config.vision_config.image_size)

    @torch.no_grad()
    def __call__(self, frames: np.ndarray, prompt: str) -> float:
        """The score of frames, uint8 [frames, height, width, 3]."""
        length = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(prompt, return_tensors="pt", truncation=True, max_length=length)
        outputs = self._model(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            pixel_values=self.prepare(frames),
        )
        text = nn.functional.normalize(outputs.text_embeds, dim=-1)
        images = nn.functional.normalize(outputs.image_embeds, dim=-1)
        return round(100 * (images @ text.T).mean().item(), 4)

    def prepare(self, frames: np.ndarray) -> Tensor:
        """Shorter side to the model's size, centre cut out, normalised: [frames, 3, size, size]."""
        pixels = torch.from_numpy(check_frames(frames)).permute(0, 3, 1, 2).float() / 255
        height, width = pixels.shape[2:]
        ratio = self._size / min(height, width)
        target = [max(self._size, round(side * ratio)) for side in (height, width)]
        pixels = nn.functional.interpolate(
            pixels, size=target, mode="bicubic", align_corners=False, antialias=True
        ).clamp(0, 1)
        top, left = ((side - self._size) // 2 for side in target)
        pixels = pixels[:, :, top : top + self._size, left : left + self._size]
        return (pixels - self._mean) / self._std


def _channels(values: Any, path: Path) -> Tensor:
    """A number for each colour, fp32 [3, 1, 1].

    Raises:
        ValueError: The file at `path` has something else.
    """
    is_triple = isinstance(values, list | tuple) and len(values) == 3
    if not is_triple or not all(type(value) in (int, float) for value in values):
        raise ValueError(f"{path}: expected three numbers, got {values!r:.60}.")
    return torch.tensor(values, dtype=torch.float32)[:, None, None]


def _normalise(x: Tensor) -> Tensor:
    return x / (x.pow(2).sum(dim=1, keepdim=True).sqrt() + 1e-10)


def _copy(target: Tensor, source: Tensor) -> None:
    if target.shape != source.shape:
        raise ValueError(f"a tensor is {list(source.shape)}, not {list(target.shape)}")
    with torch.no_grad():
        target.copy_(source)
