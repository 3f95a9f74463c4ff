"""The token grid of a forward: (model, arguments by name) -> (frames, height, width)."""

from collections.abc import Mapping
from typing import Any

from torch import nn


def latent_grid(model: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    """Latents [batch, channels, frames, height, width] cut into `config.patch_size` patches.

    Sizes that a patch does not divide are cut off by the models themselves, so they are here.
    """
    _, _, frames, height, width = arguments["hidden_states"].shape
    patch_frames, patch_height, patch_width = patch_size(model)
    return frames // patch_frames, height // patch_height, width // patch_width


def patch_size(model: nn.Module) -> tuple[int, int, int]:
    """Latent cells of one token along (frames, height, width), from the model's config."""
    config: Any = model.config
    size = config.patch_size
    if isinstance(size, int):
        return getattr(config, "patch_size_t", None) or 1, size, size
    return tuple(size)
