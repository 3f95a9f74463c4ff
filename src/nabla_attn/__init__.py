"""Block-sparse video attention that adapts to each input (NABLA), on stock PyTorch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nabla_attn.attention import build_block_map, nabla_attention
from nabla_attn.config import SparseConfig, parse
from nabla_attn.core.block_map import BlockMap
from nabla_attn.core.grid import BlockShape, TokenGrid
from nabla_attn.core.order import to_blocks, to_raster
from nabla_attn.schedule import Schedule

if TYPE_CHECKING:
    from nabla_attn.checkpoints import load_wan_pipeline, load_wan_transformer
    from nabla_attn.models import apply, register_model

__version__ = "0.1.0"

# Public names whose rooms import diffusers, loaded on first use.
_LAZY = {
    "apply": "nabla_attn.models",
    "load_wan_pipeline": "nabla_attn.checkpoints",
    "load_wan_transformer": "nabla_attn.checkpoints",
    "register_model": "nabla_attn.models",
}

__all__ = [
    "BlockMap",
    "BlockShape",
    "Schedule",
    "SparseConfig",
    "TokenGrid",
    "apply",
    "build_block_map",
    "load_wan_pipeline",
    "load_wan_transformer",
    "nabla_attention",
    "parse",
    "register_model",
    "to_blocks",
    "to_raster",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'nabla_attn' has no attribute {name!r}")
