"""Gradient checkpointing: the recomputation must see the plans of its own forward."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from nabla_attn.models.plan import Layer

_FUNCTION = "_gradient_checkpointing_func"


class PlannedCheckpoint:
    """A model's gradient checkpointing function that recomputes with the forward's plans.

    Recomputation happens in the backward, when another forward may have changed the plans.

    Args:
        original: the function it stands in for, (module, *args) -> output.
        layers: the layers whose plans are kept.
    """

    def __init__(self, original: Callable[..., Any], layers: Sequence[Layer]) -> None:
        self.original = original
        self.layers = layers

    def __call__(self, module: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoint `module` with its plans."""
        return self.original(_Replay(module, self.layers), *args, **kwargs)


class _Replay:
    """Calls a module under the plans that stood when it was made."""

    def __init__(self, module: Callable[..., Any], layers: Sequence[Layer]) -> None:
        self.module = module
        self.layers = layers
        self.snapshots = [layer.snapshot() for layer in layers]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        current = [layer.snapshot() for layer in self.layers]
        self._restore(self.snapshots)
        try:
            return self.module(*args, **kwargs)
        finally:
            self._restore(current)

    def _restore(self, snapshots: Sequence[Any]) -> None:
        for layer, snapshot in zip(self.layers, snapshots, strict=True):
            layer.restore(snapshot)


def wrap_checkpoint(model: nn.Module, layers: Sequence[Layer]) -> None:
    """Wrap the checkpointing functions of a model and its parts that are not wrapped yet."""
    for module in model.modules():
        function = module.__dict__.get(_FUNCTION)
        if function is not None and not isinstance(function, PlannedCheckpoint):
            setattr(module, _FUNCTION, PlannedCheckpoint(function, layers))


def unwrap_checkpoint(model: nn.Module) -> None:
    """Give a model its own checkpointing functions back."""
    for module in model.modules():
        function = module.__dict__.get(_FUNCTION)
        if isinstance(function, PlannedCheckpoint):
            setattr(module, _FUNCTION, function.original)
