"""The recipes of `nabla train`: pretrain, finetune and distill any model."""

import difflib
from dataclasses import replace
from pathlib import Path
from typing import Any

from nabla_attn.training.config import TrainConfig
from nabla_attn.training.overrides import override, read_override, read_yaml
from nabla_attn.training.sections import (
    CheckpointConfig,
    ObjectiveConfig,
    OptimConfig,
    SparsityConfig,
)

WORLD = "world"
"""The value of `data.folder` that draws the built-in world instead of reading a folder."""


OVERVIEW = """\
recipes:
  pretrain   pretraining with sparse attention
  finetune   your own videos, with the attention that will be used
  distill    sparse attention learns what the dense model predicts
  builtin    the built-in model from nothing, about three hours

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
