"""Overrides of a configuration, such as `optim.lr=1e-5`, and the messages about bad ones."""

import difflib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from nabla_attn.training.config import ADAPTER, StageConfig, TrainConfig, flatten, to_plain

_KINDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list such as [a, b]",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than": "less than {lt:g}",
    "less_than_equal": "{le:g} or less",
    "literal_error": "one of {expected}",
}


def override(config: TrainConfig, values: dict[str, Any]) -> TrainConfig:
    """A configuration with some values replaced, and checked.

    Args:
        config: The configuration that the other values come from.
        values: Nested values, as in a YAML file; dotted keys may be used at any level.

    Raises:
        ValueError: An unknown key, named with the closest known one, or a bad value.
    """
    try:
        return ADAPTER.validate_python(_merge(asdict(config), _nest(values)))
    except ValidationError as error:
        raise ValueError(_describe(error)) from None


def read_override(text: str) -> dict[str, Any]:
    """`key=value` of the command line as a nested dictionary; the value is YAML.

    Raises:
        ValueError: No "=", or not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"expected key=value such as optim.lr=1e-5: got {text!r}.")
    try:
        return {key.strip(): yaml.safe_load(value)}
    except yaml.YAMLError:
        raise ValueError(f"{key}: {value!r} is not a value in YAML.") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The values of a YAML file.

    Raises:
        ValueError: It cannot be read, or is not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ValueError(f"config {path}: {reason}.") from None
    if not isinstance(values or {}, dict):
        raise ValueError(f"config {path}: expected keys with values, got {values!r}.")
    return values or {}


def _nest(values: dict[Any, Any]) -> dict[str, Any]:
    """Dotted keys as nested dictionaries."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        inner = _nest(value) if isinstance(value, dict) else value
        for name in reversed(str(key).split(".")):
            inner = {name: inner}
        nested = _merge(nested, inner)
    return nested


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for key, value in new.items():
        inner = merged.get(key)
        if isinstance(value, dict) and isinstance(inner, dict):
            value = _merge(inner, value)
        merged[key] = value
    return merged


def _describe(error: ValidationError) -> str:
    """The fault of a configuration in one line; an unknown key before anything else."""
    faults = error.errors()
    unknown = [fault for fault in faults if fault["type"] == "unexpected_keyword_argument"]
    fault = (unknown or faults)[0]
    kind, given = fault["type"], fault["input"]
    *parents, name = fault["loc"] or ("",)
    # The place in a list of values says nothing; in a list of stages it does.
    key = ".".join(map(str, parents if isinstance(name, int) else [*parents, name]))
    if unknown:
        return _unknown(key)
    if kind == "value_error":
        cause = fault["ctx"]["error"]
        if isinstance(cause, ValidationError):
            return _describe(cause)
        return f"{key} {cause}: got {given!r}." if str(cause).startswith("must") else str(cause)
    if kind == "missing":
        return f"{'.'.join(map(str, parents))} lacks {name}: got {given!r}."
    if kind == "dataclass_type":
        return f"{key} has keys of its own: got {given!r}."
    expected = fault.get("ctx", {}) | {"expected": _choices(fault)}
    phrase = _KINDS[kind].format(**expected) if kind in _KINDS else fault["msg"]
    return f"{key} must be {phrase}: got {given!r}."


def _choices(fault: Any) -> str:
    """`'a', 'b' or 'c'` of pydantic as `a, b, c`."""
    text = str(fault.get("ctx", {}).get("expected", ""))
    return text.replace(" or ", ", ").replace("'", "")


def _unknown(key: str) -> str:
    known = list(flatten(to_plain(TrainConfig())))
    section, _, last = key.rpartition(".")
    if section.startswith("stages"):
        known = [f"{section}.{name}" for name in StageConfig.__dataclass_fields__]
    close = difflib.get_close_matches(key, known, 1, cutoff=0.5)
    close = close or [name for name in known if name.rpartition(".")[2] == last][:1]
    hint = f" Did you mean {close[0]}?" if close else ""
    listed = [name for name in known if name.startswith(section)] or known
    return f"unknown key {key!r}.{hint} Known: {', '.join(listed)}."
