"""The attention modules of a model."""

import re
from typing import Any

from torch import nn

from nabla_attn.models.row import ModelRow


def num_heads(module: nn.Module) -> int:
    """Query heads of an attention module."""
    for name in ("heads", "num_heads"):
        heads = getattr(module, name, None)
        if isinstance(heads, int):
            return heads
    raise ValueError(f"{type(module).__name__} does not say its number of heads (heads).")


def attention_modules(model: nn.Module, row: ModelRow) -> dict[str, Any]:
    """The video self-attentions by path.

    Raises:
        ValueError: there is none.
    """
    pattern = re.compile(row.attention)
    modules = {
        path: module
        for path, module in model.named_modules()
        if pattern.fullmatch(path.replace("_orig_mod.", "")) and hasattr(module, "processor")
    }
    if not modules:
        raise ValueError(
            f"no attention module of {type(model).__name__} matches {row.attention!r}. "
            "Give the path of each video self-attention, such as r'blocks\\.\\d+\\.attn1'."
        )
    return modules


def set_processor(module: Any, processor: Any) -> None:
    """Give an attention module another processor."""
    if hasattr(module, "set_processor"):
        module.set_processor(processor)
    else:
        module.processor = processor
