"""Where measurements of this machine are kept: the user's cache, by device and PyTorch version."""

import os
import re
from pathlib import Path

import torch

from nabla_attn.record import describe_device

VARIABLE = "NABLA_ATTN_CACHE"


def cache_folder() -> Path:
    """`$NABLA_ATTN_CACHE`, else `nabla-attn` in `$XDG_CACHE_HOME` or in `~/.cache`."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nabla-attn"


def machine_file(kind: str, device: torch.device) -> Path:
    """The file of one kind of measurement: `KIND_DEVICE_torch-VERSION.json` in `cache_folder`.

    A CPU's name has its number of threads, because measurements depend on it.
    """
    return cache_folder() / f"{kind}_{device_slug(device)}_torch-{torch.__version__}.json"


def device_slug(device: torch.device) -> str:
    """A device's name in file names."""
    return re.sub(r"[^a-z0-9.]+", "-", describe_device(device).lower()).strip("-")
