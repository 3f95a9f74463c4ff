"""The algorithm that a checkpoint was trained with, from its config."""

from typing import Any

from torch import nn

from nabla_attn.config import SparseConfig, parse


def trained_algorithm(model: nn.Module) -> SparseConfig | None:
    """The algorithm that a checkpoint's config says it was trained with; None when it says none.

    Reads `attention_type`, `attention_P` and `attention_wT/wH/wW` of Kandinsky 5 and 6,
    `nabla_threshold` and `nabla_window` of Kandinsky 6 SR, and `sparse_algo` of Wan fine-tunes.
    Kandinsky's window is always united with the map, as its own code does whatever
    `attention_add_sta` says.

    Raises:
        ValueError: the config names an algorithm that does not parse.
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
