"""Block-sparse video attention that adapts to each input (NABLA), on stock PyTorch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nabla_attn import testing
    from nabla_attn.attention import build_block_map, nabla_attention
    from nabla_attn.config import SparseConfig, parse
    from nabla_attn.core.block_map import BlockMap
    from nabla_attn.core.grid import BlockShape, TokenGrid
    from nabla_attn.core.order import to_blocks, to_raster
    from nabla_attn.methods import Selection, register_method
    from nabla_attn.models import apply, register_model
    from nabla_attn.schedule import Schedule
    from nabla_attn.wan import load_wan_pipeline, load_wan_transformer

__version__ = "0.1.0"

# Loaded on first use: the command line answers --help without torch, and torch users get no more.
_ROOMS = {
    "BlockMap": "core.block_map",
    "BlockShape": "core.grid",
    "Schedule": "schedule",
    "Selection": "methods",
    "SparseConfig": "config",
    "TokenGrid": "core.grid",
    "apply": "models",
    "build_block_map": "attention",
    "load_wan_pipeline": "wan",
    "load_wan_transformer": "wan",
    "nabla_attention": "attention",
    "parse": "config",
    "register_method": "methods",
    "register_model": "models",
    "to_blocks": "core.order",
    "to_raster": "core.order",
}

__all__ = [
    "BlockMap",
    "BlockShape",
    "Schedule",
    "Selection",
    "SparseConfig",
    "TokenGrid",
    "apply",
    "build_block_map",
    "load_wan_pipeline",
    "load_wan_transformer",
    "nabla_attention",
    "parse",
    "register_method",
    "register_model",
    "testing",
    "to_blocks",
    "to_raster",
]


def __getattr__(name: str) -> Any:
    if name == "testing":
        return import_module("nabla_attn.testing")
    if name not in _ROOMS:
        raise AttributeError(f"module 'nabla_attn' has no attribute {name!r}")
    value = getattr(import_module(f"nabla_attn.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
