"""Original Wan checkpoints: safe reading, conversion to diffusers, loading."""

from nabla_attn.checkpoints.kinds import FAMILIES, check_task
from nabla_attn.checkpoints.layout import WanLayout, is_diffusers_directory, read_layout
from nabla_attn.checkpoints.tensor_files import open_tensor_file
from nabla_attn.checkpoints.wan import load_wan_pipeline, load_wan_transformer

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
