"""LoRA through PEFT, and the dense teacher that needs no second copy."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from nabla_attn.training.objective import Teacher
from nabla_attn.training.sections import LoraConfig
from nabla_attn.training.sparsity import Sparsity

# Projections of q, k, v and the output; the second line names those of Kandinsky 5, which has
# other layers named out_layer.
PROJECTIONS = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("to_query", "to_key", "to_value", "self_attention.out_layer", "cross_attention.out_layer"),
)


def freeze(transformer: nn.Module, names: str) -> None:
    """Freeze parameters whose names a regular expression is found in; an empty one does nothing."""
    for name, parameter in transformer.named_parameters():
        if names and re.search(names, name):
            parameter.requires_grad_(False)


def add_lora(transformer: Any, config: LoraConfig, seed: int, frozen: str = "") -> None:
    """Freeze a transformer of diffusers and give it adapters that start as zero.

    Args:
        transformer: The transformer; changed in place.
        config: Rank and targets.
        seed: Seed of the initial adapters.
        frozen: Regular expression found in the names of layers that get none.

    Raises:
        ValueError: PEFT is not installed, the model takes no adapters, or no layer has that name.
    """
    try:
        import peft
    except ImportError:
        raise ValueError(
            "lora.rank needs PEFT. Install it with: pip install 'nabla-attn[train]'."
        ) from None
    if not hasattr(transformer, "add_adapter"):
        raise ValueError(f"{type(transformer).__name__} takes no adapters. Use lora.rank=0.")
    targets = _targets(transformer, config, frozen)
    transformer.requires_grad_(False)
    alpha = config.rank if config.alpha is None else config.alpha
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(
            peft.LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=targets)
        )


def _targets(transformer: nn.Module, config: LoraConfig, frozen: str) -> list[str]:
    layers = [
        name
        for name, layer in transformer.named_modules()
        if isinstance(layer, nn.Linear) and not (frozen and re.search(frozen, name))
    ]

    def fit(target: str) -> list[str]:
        return [name for name in layers if name == target or name.endswith(f".{target}")]

    # PEFT ignores a name that fits nothing as long as another one fits.
    missing = [target for target in config.targets if not fit(target)]
    if missing or not (config.targets or any(map(fit, PROJECTIONS))):
        raise ValueError(
            f"{type(transformer).__name__} has no linear layer named "
            f"{' or '.join(missing or PROJECTIONS)}. Set lora.targets to ends of names such as "
            f"{', '.join(layers[:3])}."
        )
    targets = list(config.targets) or [target for target in PROJECTIONS if fit(target)]
    if not frozen:
        return targets
    # Ends of names would fit frozen layers too; whole names do not.
    return [name for target in targets for name in fit(target)]


def copied_teacher(transformer: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, Teacher]:
    """A frozen dense copy, and how it is entered.

    Args:
        transformer: The student before training, without NABLA.
        dtype: Type of the copy; parts that diffusers keeps in float32 stay there.
    """
    copy = deepcopy(transformer).requires_grad_(False).eval()
    kept = tuple(getattr(copy, "_keep_in_fp32_modules", None) or ())
    for name, parameter in copy.named_parameters():
        if not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)

    @contextmanager
    def teacher() -> Iterator[nn.Module]:
        yield copy

    return copy, teacher


def bare_teacher(transformer: Any, sparsity: Sparsity) -> Teacher:
    """The student itself, with sparse attention and adapters switched off during a block."""
    has_adapters = bool(getattr(transformer, "peft_config", None))

    @contextmanager
    def teacher() -> Iterator[nn.Module]:
        was_training = transformer.training
        if has_adapters:
            transformer.disable_adapters()
        transformer.eval()
        try:
            with sparsity.dense():
                yield transformer
        finally:
            transformer.train(was_training)
            if has_adapters:
                transformer.enable_adapters()

    return teacher
