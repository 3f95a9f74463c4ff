"""The recipes of `nabla train`, and overrides of their values such as `optim.lr=1e-5`."""

import difflib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nabla_attn.training.config import ADAPTER, StageConfig, TrainConfig, flatten, to_plain
from nabla_attn.training.sections import (
    CheckpointConfig,
    ObjectiveConfig,
    OptimConfig,
    SparsityConfig,
)
from nabla_attn.training.yaml_text import parse_yaml

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
        return {key.strip(): parse_yaml(value)}
    except ValueError as error:
        raise ValueError(f"{key}: {value!r:.80} is not a value in YAML: {error}.") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The values of a YAML file.

    Raises:
        ValueError: It cannot be read, or is not a mapping.
    """
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"config {path}: {reason}.") from None
    if not isinstance(values or {}, dict):
        raise ValueError(f"config {path}: expected keys with values, got {values!r:.80}.")
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


WORLD = "world"
"""The value of `data.folder` that draws the built-in world instead of reading a folder."""


OVERVIEW = """\
recipes:
  pretrain   pretraining with sparse attention
  finetune   your own videos, with the attention that will be used
  distill    sparse attention learns what the dense model predicts
  builtin    the built-in model from nothing, about four hours

examples:
  nabla train distill --check                    look at everything, train nothing
  nabla train distill steps=200 lora.rank=16     the built-in model on its own world
  nabla train finetune model=MODEL_DIR data.folder=encoded/ lora.rank=16 precision=bfloat16
  nabla train finetune ... --resume              the same command continues where it stopped

Clips for other models are encoded once: nabla encode VIDEOS --model MODEL_DIR --output encoded/
"""


def pretrain() -> TrainConfig:
    """Pretrain with sparse attention, as the paper's last stage does (arXiv:2507.13546, 4.3)."""
    return TrainConfig(
        recipe="pretrain",
        objective=ObjectiveConfig(kind="flow", times="logit-normal"),
        sparsity=SparsityConfig(algorithm="nabla-0.8"),
        optim=OptimConfig(lr=3e-5, weight_decay=1e-3, max_norm=1.0, warmup=500),
        steps=10_000,
        ema=0.999,
        checkpoint=CheckpointConfig(every=500),
    )


def finetune() -> TrainConfig:
    """Fine-tune on your own videos, with the attention that will be used."""
    return TrainConfig(
        recipe="finetune",
        objective=ObjectiveConfig(kind="flow", times="uniform"),
        optim=OptimConfig(lr=1e-5, max_norm=1.0, warmup=50, decay="cosine"),
        steps=2_000,
    )


def distill() -> TrainConfig:
    """Teach sparse attention what the dense model predicts (arXiv:2507.13546, 4.1 and A)."""
    return TrainConfig(
        recipe="distill",
        objective=ObjectiveConfig(kind="distill"),
        optim=OptimConfig(),
        steps=1_600,
    )


RECIPES = {recipe.__name__: recipe for recipe in (pretrain, finetune, distill)}


def find_recipe(name: str) -> TrainConfig:
    """The configuration of a recipe.

    Raises:
        ValueError: No recipe has that name.
    """
    if name not in RECIPES:
        known = ["builtin", *RECIPES]
        close = difflib.get_close_matches(name, known, 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(f"unknown recipe {name!r}.{hint} Known: {', '.join(known)}.")
    return RECIPES[name]()


def read_config(recipe: str, values: list[str], config_file: Path | None = None) -> TrainConfig:
    """A recipe with the overrides of a YAML file and then those of the command line.

    Args:
        recipe: Name of the recipe.
        values: Overrides such as "optim.lr=1e-5".
        config_file: A YAML file of overrides.

    Raises:
        ValueError: Anything in it is unknown, of the wrong kind or out of range, or no data is
            named for a model other than the built-in one.
    """
    config = find_recipe(recipe)
    if config_file is not None:
        config = override(config, read_yaml(config_file))
    merged: dict[str, Any] = {}
    for value in values:
        merged |= read_override(value)
    config = override(config, merged)
    if config.data.folder or (config.stages and all(stage.folder for stage in config.stages)):
        return config
    if config.model != "builtin":
        raise ValueError(
            "no data: set data.folder=DIR to clips that `nabla encode` has written with "
            f"{config.model}, or to {WORLD} for the built-in world."
        )
    return replace(config, data=replace(config.data, folder=WORLD))
