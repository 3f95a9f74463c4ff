"""Which algorithm a checkpoint asks for, and putting it on."""

from pathlib import Path
from typing import Any

from nabla_attn.wan.tensor_files import read_config

DEFAULTS = "defaults.json"


def stored_sparsity(path: Path) -> str | None:
    """The ``sparse_algo`` that a diffusers directory carries in its defaults.json, if any."""
    if not (path / DEFAULTS).is_file():
        return None
    value = read_config(path / DEFAULTS).get("sparse_algo")
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{path / DEFAULTS}: sparse_algo is {value!r}, not a string.")
    return value


def apply_sparsity(model: Any, sparse_algo: str | None) -> None:
    """Put ``sparse_algo`` on a model or pipeline; None and ``"dense"`` leave it dense.

    Raises:
        ValueError: the algorithm is unknown.
    """
    if sparse_algo is None:
        return
    from nabla_attn.config import parse

    if not parse(sparse_algo).is_dense:
        from nabla_attn.models import apply

        apply(model, sparse_algo)
