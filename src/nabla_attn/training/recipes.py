"""The recipes of `nabla train` for any model: pretrain, finetune, distill."""

import difflib

from nabla_attn.training.config import (
    CheckpointConfig,
    ObjectiveConfig,
    OptimConfig,
    SparsityConfig,
    TrainConfig,
)


def pretrain() -> TrainConfig:
    """A stage of pretraining with sparse attention, as the paper's last one (section 4.3)."""
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
    """Fine-tune on one's own videos, with the attention that will be used."""
    return TrainConfig(
        recipe="finetune",
        objective=ObjectiveConfig(kind="flow", times="uniform"),
        optim=OptimConfig(lr=1e-5, max_norm=1.0, warmup=50, decay="cosine"),
        steps=2_000,
    )


def distill() -> TrainConfig:
    """Teach sparse attention what the dense model predicts, with the paper's numbers (4.1, A)."""
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
