"""Where encoded clips come from."""

from math import prod
from pathlib import Path

from nabla_attn.files import read_json
from nabla_attn.training.data import store


def world_size(folder: Path) -> tuple[int, int, int] | None:
    """Largest (frames, height, width) of clips of the built-in world; None for any other source.

    Raises:
        ValueError: not a finished folder of encoded clips.
    """
    entries = store.read_index(folder)
    source = read_json(folder / store.ENCODING).get("source", "")
    if not str(source).startswith("world, "):
        return None
    return max((entry.size for entry in entries), key=prod)
