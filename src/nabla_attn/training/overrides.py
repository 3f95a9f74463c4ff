"""Overrides of a configuration: `optim.lr=1e-5` and YAML files, checked key by key."""

import difflib
import types
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from nabla_attn.training.config import TrainConfig
from nabla_attn.training.limits import check_config


def override(config: TrainConfig, values: dict[str, Any]) -> TrainConfig:
    """A configuration with some values replaced, and checked.

    Args:
        config: Where the other values come from.
        values: Nested values, as in a YAML file; dotted keys may be used at any level.

    Raises:
        ValueError: An unknown key, named with the closest known one, or a bad value.
    """
    merged: TrainConfig = _replace(config, _nest(values), "")
    check_config(merged)
    return merged


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


def from_plain(values: dict[str, Any]) -> TrainConfig:
    """Read a configuration that `to_plain` wrote."""
    return override(TrainConfig(), values)


def to_plain(config: TrainConfig) -> dict[str, Any]:
    """A configuration as plain JSON values."""
    return _plain(asdict(config))


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What changed between two plain configurations, such as `optim.lr: 1e-06 -> 1e-05`.

    A key that the old one lacks was not there then, and had the effect of its default.
    """
    before, after = flatten(to_plain(TrainConfig())) | flatten(old), flatten(new)
    keys = [*before, *(key for key in after if key not in before)]
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in keys
        if before.get(key) != after.get(key)
    ]


def _nest(values: dict[Any, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in values.items():
        inner = _nest(value) if isinstance(value, dict) else value
        *parents, last = str(key).split(".")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ValueError(f"{key}: {parent} is given a value and keys of its own.")
        if isinstance(inner, dict) and isinstance(place.get(last), dict):
            inner = place[last] | inner
        place[last] = inner
    return nested


def _replace(target: Any, values: dict[str, Any], prefix: str) -> Any:
    hints = get_type_hints(type(target))
    changes = {}
    for key, value in values.items():
        if key not in hints:
            raise ValueError(_unknown(prefix + key, prefix))
        now = getattr(target, key)
        if is_dataclass(now):
            if not isinstance(value, dict):
                raise ValueError(f"{prefix}{key} has keys of its own: got {value!r}.")
            changes[key] = _replace(now, value, f"{prefix}{key}.")
        else:
            changes[key] = _convert(value, hints[key], prefix + key)
    return replace(target, **changes)


def _unknown(key: str, prefix: str) -> str:
    known = list(flatten(asdict(TrainConfig())))
    close = difflib.get_close_matches(key, known, 1, cutoff=0.5)
    if not close:
        last = key.rpartition(".")[2]
        close = [name for name in known if name.rpartition(".")[2] == last][:1]
    hint = f" Did you mean {close[0]}?" if close else ""
    section = [name for name in known if name.startswith(prefix)]
    return f"unknown key {key!r}.{hint} Known: {', '.join(section)}."


def _convert(value: Any, kind: Any, key: str) -> Any:
    """`value` as `kind`; whole numbers pass as floats, and "1e-6", which YAML leaves a string."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (kind,) = (each for each in arguments if each is not type(None))
        return _convert(value, kind, key)
    if origin is tuple:
        return _convert_tuple(value, arguments, key)
    if is_dataclass(kind):
        return _build(kind, value, key)
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif type(value) is kind:
        return value
    elif kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    raise ValueError(f"{key} must be {names[kind]}: got {value!r}.")


def _convert_tuple(value: Any, kinds: tuple[Any, ...], key: str) -> tuple[Any, ...]:
    if isinstance(value, str):
        value = [_read_part(part.strip(), kinds[0]) for part in value.split(",")]
    if not isinstance(value, list | tuple):
        raise ValueError(f"{key} must be a list such as [a, b]: got {value!r}.")
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    if len(kinds) != len(value):
        raise ValueError(f"{key} must have {len(kinds)} values: got {value!r}.")
    return tuple(_convert(each, kind, key) for each, kind in zip(value, kinds, strict=True))


def _read_part(text: str, kind: Any) -> Any:
    """One value of a list such as `1,2`, which YAML takes for text as a whole."""
    try:
        return text if kind is str else yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _build(kind: Any, value: Any, key: str) -> Any:
    known = {item.name: item for item in fields(kind)}
    if not isinstance(value, dict) or value.keys() - known.keys():
        raise ValueError(f"{key} must be entries with {', '.join(known)}: got {value!r}.")
    missing = [name for name, item in known.items() if item.default is MISSING]
    if missing := [name for name in missing if name not in value]:
        raise ValueError(f"{key}: an entry lacks {', '.join(missing)}.")
    hints = get_type_hints(kind)
    return kind(**{name: _convert(each, hints[name], key) for name, each in value.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
