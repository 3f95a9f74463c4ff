"""Weights with their architecture inside: safetensors files, and what makes networks of them."""

import json
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import nn

from isynet.architecture import Architecture, parse
from isynet.family import find_architecture
from isynet.mindspore import load_mindspore
from isynet.network import FeatureMaps, ISyNet
from nabla_attn.files import parse_json, whole_file

FORMAT = "isynet-1"


@overload
def create(
    source: str | Path | Architecture,
    num_classes: int | None = None,
    in_chans: int | None = None,
    *,
    weights: str | Path | None = None,
    features_only: Literal[False] = False,
    out_indices: None = None,
) -> ISyNet: ...


@overload
def create(
    source: str | Path | Architecture,
    num_classes: int | None = None,
    in_chans: int | None = None,
    *,
    weights: str | Path | None = None,
    features_only: Literal[True],
    out_indices: tuple[int, ...] | None = None,
) -> FeatureMaps: ...


def create(
    source: str | Path | Architecture,
    num_classes: int | None = None,
    in_chans: int | None = None,
    *,
    weights: str | Path | None = None,
    features_only: bool = False,
    out_indices: tuple[int, ...] | None = None,
) -> ISyNet | FeatureMaps:
    """Create a network from a name, an architecture or a file.

    Args:
        source: The name of a published network (`"isynet-n1"`), an architecture or its string, an
            authors' `.json` file, or a `.safetensors` file that `save` wrote.
        num_classes: Number of classes, 1000 by default. If it differs from those of the weights the
            classifier is new and random.
        in_chans: Channels of the input, 3 by default; of a file, those it was saved with.
        weights: The `.safetensors` file of weights for `source`.
        features_only: Whether to return the stages alone, whose forward gives a list of maps.
        out_indices: Stages whose maps are returned, all by default.

    Returns:
        The network in training mode, as PyTorch makes modules; call `eval()` before inference.

    Raises:
        ValueError: An unknown name, or a file that is not what it should be or does not fit.
        OSError: A file cannot be read.
    """
    is_file = not isinstance(source, Architecture) and str(source).endswith(".safetensors")
    file: Any = source if is_file else weights
    if file is None:
        architecture = find_architecture(source)
        net = ISyNet(architecture, 1000 if num_classes is None else num_classes, in_chans or 3)
    else:
        net = load(file)
        if file is weights and net.architecture != find_architecture(source):
            raise ValueError(
                f"{file} holds weights of {net.architecture}, not of {source}. Leave the name out."
            )
        if in_chans not in (None, net.in_chans):
            raise ValueError(f"{file} takes {net.in_chans} channels, got in_chans={in_chans}.")
        if num_classes not in (None, net.num_classes):
            net.reset_classifier(num_classes)
    return FeatureMaps(net, out_indices, as_list=True) if features_only else net


def save(net: ISyNet, path: str | Path) -> None:
    """Write weights and architecture as safetensors, whole or not at all.

    Raises:
        ValueError: The network is fused, or the file's name does not end in `.safetensors`.
    """
    from safetensors.torch import save_file

    if Path(path).suffix != ".safetensors":
        raise ValueError(f"weights are written as .safetensors, got {path}.")
    if not any(isinstance(module, nn.BatchNorm2d) for module in net.modules()):
        raise ValueError("a fused network cannot be trained again. Save the one it came from.")
    about = {
        "format": FORMAT,
        "architecture": str(net.architecture),
        "num_classes": str(net.num_classes),
        "in_chans": str(net.in_chans),
        "has_last_norm": str(int(net.has_last_norm)),
        "mean": json.dumps(net.default_cfg["mean"]),
        "std": json.dumps(net.default_cfg["std"]),
    }
    state = {name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()}
    with whole_file(path) as temporary:
        save_file(state, temporary, metadata=about)


def load(path: str | Path) -> ISyNet:
    """Read a network that `save` wrote, in training mode.

    Raises:
        ValueError: Not such a file; it is named.
        OSError: The file cannot be read.
    """
    from safetensors.torch import load_file

    net = _outline(path).to_empty(device="cpu")
    net.load_state_dict(load_file(path))
    return net


def architecture_of(source: str | Path | Architecture) -> Architecture:
    """The architecture of a name, a string, an authors' `.json` or a `.safetensors` file.

    Raises:
        ValueError: None of them, or the file is damaged.
    """
    if isinstance(source, Architecture) or Path(source).suffix != ".safetensors":
        return find_architecture(source)
    return _outline(source).architecture


def convert(
    source: str | Path,
    path: str | Path | None = None,
    *,
    architecture: str | Path | Architecture | None = None,
    is_peer: bool = False,
) -> Path:
    """Convert a checkpoint of the authors' MindSpore code to safetensors.

    Args:
        source: The `.ckpt` file.
        path: The file to write; by default beside `source`, with the ending `.safetensors`.
        architecture: What the checkpoint was trained as; by default the published network it fits.
        is_peer: Whether to take the second network of a pair that was trained together.

    Returns:
        The file, which `create` takes.

    Raises:
        ValueError: The file is no such checkpoint, or no known architecture fits it.
        OSError: A file cannot be read or written.
    """
    result = Path(path) if path else Path(source).with_suffix(".safetensors")
    save(load_mindspore(source, architecture, is_peer=is_peer), result)
    return result


def register_timm() -> None:
    """Register the published networks with timm, which is imported now: `timm.create_model`.

    Raises:
        ImportError: Timm is not installed.
    """
    from timm.models import register_model

    from isynet.family import FAMILY

    for name in FAMILY:
        register_model(_timm_entry(name))


def _timm_entry(name: str) -> Any:
    def entry(pretrained: bool = False, **options: Any) -> nn.Module:
        if pretrained:
            raise ValueError("no weights are shipped; pass weights= a .safetensors file.")
        # What timm's factory passes on its own account; anything else unknown is a TypeError.
        for own in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
            options.pop(own, None)
        return create(name, **options)

    entry.__name__ = name.replace("-", "_")
    entry.__module__ = __name__
    return entry


def _outline(path: str | Path) -> ISyNet:
    """The network of a file on the meta device, checked to have the shapes of its tensors.

    What a hostile file claims is compared with what it holds before anything is allocated.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise ValueError(f"no file {path}.")
    try:
        with safe_open(str(path), framework="pt") as file:
            about = file.metadata() or {}
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no weights of ISyNet: {error}.") from error
    if about.get("format") != FORMAT:
        raise ValueError(
            f"{path} holds no ISyNet. Weights of MindSpore go through `isynet convert`."
        )
    try:
        net = _net_of(about)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: its description cannot be read ({error}).") from error
    if {name: tuple(value.shape) for name, value in net.state_dict().items()} != found:
        raise ValueError(f"{path} is damaged: its tensors do not fit {net.architecture}.")
    return net


def _net_of(about: dict[str, str]) -> ISyNet:
    with torch.device("meta"):
        net = ISyNet(
            parse(about["architecture"]),
            int(about["num_classes"]),
            int(about["in_chans"]),
            has_last_norm=about["has_last_norm"] == "1",
        )
    for name in ("mean", "std"):
        net.default_cfg[name] = tuple(float(value) for value in parse_json(about[name]))
    return net
