"""Original Wan checkpoints: read safely, loaded, converted, and run by the reference's command.

In reading order: `tasks`, `request` and `command` are the command line; `layout`, `tensor_files`,
`names`, `shapes` and `parts` read checkpoints; `pipeline` loads them, with the numbers of
`reference`; `convert` writes them for diffusers; `memory` foretells what they need.
"""

from nabla_attn.wan.layout import WanLayout, is_diffusers_directory, read_layout
from nabla_attn.wan.pipeline import load_wan_pipeline, load_wan_transformer
from nabla_attn.wan.tasks import WAN_FAMILIES, check_task
from nabla_attn.wan.tensor_files import open_tensor_file

__all__ = [
    "WAN_FAMILIES",
    "WanLayout",
    "check_task",
    "is_diffusers_directory",
    "load_wan_pipeline",
    "load_wan_transformer",
    "open_tensor_file",
    "read_layout",
]
