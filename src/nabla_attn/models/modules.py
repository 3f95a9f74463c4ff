"""The model inside wrappers, and its attention modules."""

import re
from typing import Any

from torch import nn

from nabla_attn.models.row import ModelRow


def unwrap(model: Any) -> Any:
    """The diffusers model inside torch.compile, PEFT and data-parallel wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            model = model.module
        else:
            return model


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
