"""`model_index.json` of a diffusers pipeline directory: the class of the pipeline and its parts."""

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nabla_attn.files import fingerprint_files, read_json

# Only these and diffusers' own pipelines may be named: others could run code of the directory.
LIBRARIES = ("diffusers", "transformers")


def read_model_index(directory: Path) -> dict[str, Any]:
    """What a directory's `model_index.json` says, its entries checked.

    Raises:
        ValueError: It cannot be read, is not JSON, names no pipeline class, or has a part that
            is not one of diffusers or transformers.
    """
    path = directory / "model_index.json"
    index = read_json(path)
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise ValueError(f"{path}: it does not name a diffusers pipeline class as _class_name.")
    for name, entry in _entries(index).items():
        if len(entry) != 2 or not name.isidentifier():
            raise ValueError(f"{path}: the entry {name!r} is not [library, class].")
        if entry[0] is not None and _module_of(entry[0]) is None:
            raise ValueError(
                f"{path}: {name} comes from {entry[0]!r}, and only "
                f"{' and '.join(LIBRARIES)} are loaded."
            )
    return index


def named_parts(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Library and class of every part that a model index names; those left empty are left out."""
    return {
        name: (entry[0], entry[1])
        for name, entry in _entries(index).items()
        if entry[0] is not None
    }


def find_class(library: str, name: str, directory: Path) -> Any:
    """A class that loads from a directory.

    Raises:
        ValueError: The installed library has none of that name; `directory` asked for it.
    """
    found = getattr(importlib.import_module(_module_of(library) or library), str(name), None)
    if not isinstance(found, type) or not hasattr(found, "from_pretrained"):
        raise ValueError(f"{directory}: the installed {library} has no class {name!r} to load.")
    return found


def _module_of(library: Any) -> str | None:
    """The module that a library of an index stands for; None for what is not loaded.

    Parts that one pipeline alone has, such as the connectors of LTX-2, come from "ltx2".
    """
    if library in LIBRARIES:
        return str(library)
    if not isinstance(library, str) or not library.isidentifier():
        return None
    path = f"diffusers.pipelines.{library}"
    return path if importlib.util.find_spec(path) is not None else None


def fingerprint(model: Path) -> str:
    """`fingerprint_files` of those that a pipeline is loaded from."""
    return fingerprint_files(model, [model / "model_index.json", *sorted(model.glob("*/[!.]*"))])


def _entries(index: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {
        name: entry
        for name, entry in index.items()
        if isinstance(entry, list) and not name.startswith("_")
    }
