"""Which built-in model a record is of: the present one, or the first, which was smaller."""

from collections.abc import Mapping
from typing import Any

STRIDE = 8
"""Pixels of a token's side."""

FIRST_SIDE = 128
"""Pixels of the sides that the first built-in model was made for."""


def the_model(config: Mapping[str, Any]) -> str:
    """Return "The built-in model", or "The first built-in model" where a record is of that one.

    Args:
        config: The record's, with `height` in pixels or `tokens` (frames, rows, columns).
    """
    height = config.get("height") or STRIDE * config["tokens"][1]
    return "The first built-in model" if height == FIRST_SIDE else "The built-in model"


def size_of(config: Mapping[str, Any]) -> str:
    """Width and height in pixels, such as 256x256."""
    return f"{config['width']}x{config['height']}"
