"""ComfyUI node package of nabla-attn; copy or symlink this folder into ComfyUI/custom_nodes."""

from .nodes import NablaAttention

NODE_CLASS_MAPPINGS = {"NablaAttention": NablaAttention}
NODE_DISPLAY_NAME_MAPPINGS = {"NablaAttention": "NABLA Attention"}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
