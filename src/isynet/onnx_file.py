"""ONNX files, checked against PyTorch before anyone uses or times them."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from isynet.network import ISyNet
from nabla_attn.files import check_writable, whole_file

OPSET = 17
TOLERANCE = 1e-4
"""Largest error that a checked file may have, relative to the largest output."""


@dataclass(frozen=True)
class Exported:
    """An ONNX file that was checked.

    Attributes:
        path: The file.
        error: Largest difference from PyTorch, relative to the largest output.
        size: Height and width of the images it was checked with.
    """

    path: Path
    error: float
    size: tuple[int, int]


def export(
    net: nn.Module,
    path: str | Path,
    size: int | tuple[int, int] = 224,
    *,
    batch: int = 2,
    in_chans: int | None = None,
) -> Exported:
    """Write a network as ONNX and check it with onnxruntime; the batch stays free.

    Batch norms of our networks are folded first. The network is left as it was.

    Args:
        net: The network, ours or any that maps images to a tensor.
        path: The `.onnx` file; it appears whole and checked, or not at all.
        size: Pixels of the images, one number or (height, width).
        batch: Images of the check.
        in_chans: Channels of the images; by default the network's own, or 3.

    Raises:
        ValueError: The name does not end in `.onnx`, or the file's outputs differ from PyTorch's.
        ImportError: Onnx or onnxruntime is missing; `pip install nabla-attn[isynet]`.
    """
    if Path(path).suffix != ".onnx":
        raise ValueError(f"an ONNX file is written as .onnx, got {path}.")
    check_writable(path)
    sides = (size, size) if isinstance(size, int) else size
    channels = in_chans or (net.in_chans if isinstance(net, ISyNet) else 3)
    images = torch.randn(batch, channels, *sides, generator=torch.Generator().manual_seed(0))
    plain = (net.fused() if isinstance(net, ISyNet) else net).eval()
    with torch.no_grad():
        wanted = plain(images).numpy()
    with whole_file(path) as temporary:
        write_onnx(plain, temporary, images)
        # A loaded session holds its file, so the check reads bytes.
        found = open_session(temporary.read_bytes()).run(None, {"images": images.numpy()})[0]
        error = float(np.abs(found - wanted).max() / (np.abs(wanted).max() or 1.0))
        if not error <= TOLERANCE:
            raise ValueError(
                f"the ONNX file differs from PyTorch by {error:.2g}, more than {TOLERANCE:.0e}; "
                "nothing was written."
            )
    return Exported(Path(path), error, sides)


def write_onnx(net: nn.Module, path: Path, images: torch.Tensor) -> None:
    """Trace a network in evaluation mode into an ONNX file, unchecked."""
    with warnings.catch_warnings():
        # The exporter that traces is the faster one; that it is the older one is no news here.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net,
            (images,),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
        )


def open_session(model: bytes, threads: int = 1) -> Any:
    """An onnxruntime session on the CPU.

    Raises:
        ImportError: Onnxruntime is missing; what to install is named.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            "timing and checking ONNX needs onnxruntime: pip install nabla-attn[isynet]."
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
