"""Files of detectors: weights with architecture and classes, and pictures of what was found."""

import json
from pathlib import Path

import torch
from torch import Tensor

from isynet.architecture import parse
from isynet.data.source import Objects
from isynet.detection.network import Detector
from isynet.network import ISyNet
from nabla_attn.files import parse_json, whole_file

FORMAT = "isynet-detector-1"
COLOURS = ("#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#911eb4", "#46f0f0")


def save_detector(detector: Detector, path: str | Path) -> None:
    """Write a detector's weights, architecture and classes as safetensors, whole or not at all.

    Raises:
        ValueError: Its network is none of ours.
    """
    from safetensors.torch import save_file

    if not isinstance(detector.net, ISyNet):
        raise ValueError("a detector on another network than ours has no architecture to write.")
    # The backbone shares its weights with the network, and what follows the maps is not used.
    state = {
        name: value.detach().cpu().contiguous()
        for name, value in detector.state_dict().items()
        if not name.startswith("net.")
    }
    about = {
        "format": FORMAT,
        "architecture": str(detector.net.architecture),
        "classes": json.dumps(detector.classes),
        "in_chans": str(detector.net.in_chans),
        "channels": str(detector.width),
    }
    with whole_file(path) as temporary:
        save_file(state, temporary, metadata=about)


def load_detector(path: str | Path) -> Detector:
    """Read a detector that `save_detector` wrote, in evaluation mode.

    Raises:
        ValueError: Not such a file; it is named.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise ValueError("it has another format")
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            # What a hostile file claims is compared with what it holds before it is allocated.
            with torch.device("meta"):
                outline = _detector_of(about).state_dict()
            own = {name: value for name, value in outline.items() if not name.startswith("net.")}
            if {name: tuple(value.shape) for name, value in own.items()} != found:
                raise ValueError("its tensors do not fit its own architecture")
            state = {name: file.get_tensor(name) for name in found}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or no detector of ISyNet: {error}") from error
    detector = _detector_of(about)
    detector.load_state_dict(state, strict=False)
    return detector.eval()


def _detector_of(about: dict[str, str]) -> Detector:
    """The detector that a file's description asks for.

    Raises:
        ValueError, KeyError, TypeError, RuntimeError: The description is damaged.
    """
    classes = parse_json(about["classes"])
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"the classes must be names, got {classes!r:.60}.")
    net = ISyNet(parse(about["architecture"]), 0, int(about["in_chans"]))
    return Detector(net, tuple(classes), channels=int(about["channels"]))


def save_picture(
    images: Tensor,
    found: list[tuple[Objects, Tensor]],
    path: str | Path,
    *,
    count: int = 16,
    threshold: float = 0.3,
    zoom: int = 3,
) -> None:
    """Draw the boxes found on the first images, side by side, as PNG."""
    from PIL import Image, ImageDraw

    images = images[:count]
    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    height, width = (side * zoom for side in images.shape[2:])
    sheet = Image.new("RGB", (columns * width, rows * height))
    for index, image in enumerate(images):
        pixels = (image.expand(3, -1, -1) * 255).round().byte().permute(1, 2, 0).numpy()
        tile = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
        draw = ImageDraw.Draw(tile)
        objects, scores = found[index]
        for box, label, score in zip(objects.boxes, objects.labels, scores, strict=True):
            if score >= threshold:
                corners = [float(value) * zoom for value in box]
                draw.rectangle(corners, outline=COLOURS[int(label) % len(COLOURS)], width=2)
        sheet.paste(tile, (index % columns * width, index // columns * height))
    with whole_file(path) as temporary:
        sheet.save(temporary, format="PNG")
