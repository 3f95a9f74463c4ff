"""Convolutional networks that suit a machine (ISyNet, arXiv:2109.01932)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isynet.architecture import Architecture, Stage, parse
    from isynet.authors_json import load_json, save_json
    from isynet.checkpoint import convert, create, load, register_timm, save
    from isynet.counting import count
    from isynet.evolution import search
    from isynet.growth import scale
    from isynet.latency import LatencyTable
    from isynet.network import FeatureMaps, ISyNet
    from isynet.onnx_file import export
    from isynet.space import SearchSpace

# Loaded on first use, so that `isynet --help` answers without torch.
_ROOMS = {
    "Architecture": "architecture",
    "FeatureMaps": "network",
    "ISyNet": "network",
    "Stage": "architecture",
    "convert": "checkpoint",
    "export": "onnx_file",
    "count": "counting",
    "create": "checkpoint",
    "load": "checkpoint",
    "load_json": "authors_json",
    "parse": "architecture",
    "register_timm": "checkpoint",
    "save": "checkpoint",
    "scale": "growth",
    "search": "evolution",
    "SearchSpace": "space",
    "LatencyTable": "latency",
    "save_json": "authors_json",
}

__all__ = [
    "Architecture",
    "FeatureMaps",
    "ISyNet",
    "LatencyTable",
    "SearchSpace",
    "Stage",
    "convert",
    "count",
    "create",
    "export",
    "load",
    "load_json",
    "parse",
    "register_timm",
    "save",
    "save_json",
    "scale",
    "search",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'isynet' has no attribute {name!r}")
    value = getattr(import_module(f"isynet.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
