"""`model_index.json` of a diffusers pipeline directory: the class of the pipeline and its parts."""

import importlib
import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nabla_attn.files import fingerprint_files, read_json, read_object

# Only these and diffusers' own pipelines may be named: others could run code of the directory.
LIBRARIES = ("diffusers", "transformers")


# Settings of a configuration that say how many modules are built one after another.
COUNTS = re.compile(r"(.*_)?(n_layer|depth|layers|blocks)(_per_block)?")
MOST_LAYERS = 1000
"""What a configuration may always ask for; more of them need as many tensors."""


def check_layers(folder: Path) -> None:
    """Refuse a part of a model whose configuration asks for more layers than its files can have.

    Building hundreds of millions takes hours before anything is compared with the weights.

    Args:
        folder: The part's folder.

    Raises:
        ValueError: It does, or its configuration is no JSON object; the file is named.
    """
    path = folder / "config.json"
    if not path.is_file():
        return
    limit = max(MOST_LAYERS, _num_tensors(folder))
    for name, count in _counts(read_object(path)):
        if count > limit:
            raise ValueError(f"{path}: {name} asks for {count} layers, and the weights have fewer.")


def _counts(values: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number of modules in a configuration: counts, and lengths of lists."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _counts(value, key)
    elif isinstance(values, list):
        yield name, len(values)
        for value in values:
            yield from _counts(value, name)
    elif isinstance(values, int | float) and COUNTS.fullmatch(name):
        yield name, values


def _num_tensors(folder: Path) -> int:
    from safetensors import SafetensorError, safe_open

    count = 0
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(str(file), framework="pt") as opened:
                count += len(opened.keys())
        except (SafetensorError, OSError):
            continue  # loading says what is wrong with it
    return count


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
