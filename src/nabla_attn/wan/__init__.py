"""Original Wan checkpoints: safe reading, conversion to diffusers, loading."""

from nabla_attn.wan.kinds import FAMILIES, check_task
from nabla_attn.wan.layout import WanLayout, is_diffusers_directory, read_layout
from nabla_attn.wan.pipeline import load_wan_pipeline, load_wan_transformer
from nabla_attn.wan.tensor_files import open_tensor_file

__all__ = [
    "FAMILIES",
    "WanLayout",
    "check_task",
    "is_diffusers_directory",
    "load_wan_pipeline",
    "load_wan_transformer",
    "open_tensor_file",
    "read_layout",
]
