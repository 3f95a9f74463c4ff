"""LPIPS (AlexNet, version 0.1) from local weights; nothing is downloaded.

Save them once, where the ``lpips`` package is installed:
``torch.save(lpips.LPIPS(net="alex").state_dict(), "lpips_alex.pt")``.
Source: Zhang et al., arXiv:1801.03924; layers of torchvision's AlexNet.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

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

MIN_SIDE = 63  # pixels; smaller pictures vanish in the poolings
BATCH = 16  # frames


class LPIPS(nn.Module):
    """Perceptual distance of pictures: 0 for the same, about 1 for unrelated ones.

    Args:
        path: the state dict of ``lpips.LPIPS(net="alex")``.

    Raises:
        ValueError: the file cannot be read or holds other weights.
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
            ValueError: values outside [-1, 1]: other ranges give plausible, wrong numbers.
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
        model: the network.
        frames: uint8 [frames, height, width, 3].
        reference: the same shape.

    Raises:
        ValueError: frames smaller than 63 pixels.
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


def _normalise(x: Tensor) -> Tensor:
    return x / (x.pow(2).sum(dim=1, keepdim=True).sqrt() + 1e-10)


def _copy(target: Tensor, source: Tensor) -> None:
    if target.shape != source.shape:
        raise ValueError(f"a tensor is {list(source.shape)}, not {list(target.shape)}")
    with torch.no_grad():
        target.copy_(source)
