"""What is read off a diffusers model: what its wrappers hold, its attention, how it was trained."""

import re
from typing import Any

from torch import nn

from nabla_attn.config import SparseConfig, parse
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
        ValueError: There is none.
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


def trained_algorithm(model: nn.Module) -> SparseConfig | None:
    """The algorithm that a checkpoint's config says it was trained with; None when it says none.

    Reads `attention_type`, `attention_P` and `attention_wT/wH/wW` of Kandinsky 5 and 6,
    `nabla_threshold` and `nabla_window` of Kandinsky 6 SR, and `sparse_algo` of Wan fine-tunes.
    Kandinsky's window is always united with the map, as its own code does whatever
    `attention_add_sta` says.

    Raises:
        ValueError: The config names an algorithm that does not parse.
    """
    config: Any = model.config
    if config.get("sparse_algo"):
        return parse(config["sparse_algo"])
    if config.get("nabla_threshold") is not None:
        window = config.get("nabla_window")
        return SparseConfig(threshold=config["nabla_threshold"], window=window and tuple(window))
    if config.get("attention_type") != "nabla":
        return None
    sides = tuple(config.get(f"attention_{side}") for side in ("wT", "wH", "wW"))
    return SparseConfig(
        threshold=config.get("attention_P"),
        window=None if None in sides else sides,  # type: ignore[arg-type]
    )
