"""Gradient checkpointing: the recomputation must see the plans of its own forward."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from nabla_attn.models.modules import set_processor
from nabla_attn.models.plan import Layer, Snapshot

_FUNCTION = "_gradient_checkpointing_func"


class PlannedCheckpoint:
    """A model's gradient checkpointing function that recomputes with the forward's plans.

    Recomputation happens in the backward, when another forward may have changed the plans, or NABLA
    may have been removed.

    Args:
        original: The function it stands in for, (module, *args) -> output.
        layers: The layers whose plans are kept.
        modules: Their attention modules, whose processors are kept.
    """

    def __init__(
        self, original: Callable[..., Any], layers: Sequence[Layer], modules: Sequence[Any]
    ) -> None:
        self.original = original
        self.layers = layers
        self.modules = modules

    def __call__(self, module: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoint `module` with its plans."""
        return self.original(_Replay(module, self.layers, self.modules), *args, **kwargs)


class _Replay:
    """Calls a module under the plans and processors that stood when it was made."""

    def __init__(
        self, module: Callable[..., Any], layers: Sequence[Layer], modules: Sequence[Any]
    ) -> None:
        self.module = module
        self.layers = layers
        self.modules = modules
        self.made = self._current()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        current = self._current()
        self._restore(self.made)
        try:
            return self.module(*args, **kwargs)
        finally:
            self._restore(current)

    def _current(self) -> list[tuple[Snapshot, Any]]:
        pairs = zip(self.layers, self.modules, strict=True)
        return [(layer.snapshot(), module.processor) for layer, module in pairs]

    def _restore(self, states: list[tuple[Snapshot, Any]]) -> None:
        for layer, module, state in zip(self.layers, self.modules, states, strict=True):
            snapshot, processor = state
            layer.restore(snapshot)
            if module.processor is not processor:
                set_processor(module, processor)


def wrap_checkpoint(model: nn.Module, layers: Sequence[Layer], modules: Sequence[Any]) -> None:
    """Wrap the checkpointing functions of a model and its parts that are not wrapped yet."""
    for module in model.modules():
        function = module.__dict__.get(_FUNCTION)
        if function is not None and not isinstance(function, PlannedCheckpoint):
            setattr(module, _FUNCTION, PlannedCheckpoint(function, layers, modules))


def unwrap_checkpoint(model: nn.Module) -> None:
    """Give a model its own checkpointing functions back."""
    for module in model.modules():
        function = module.__dict__.get(_FUNCTION)
        if isinstance(function, PlannedCheckpoint):
            setattr(module, _FUNCTION, function.original)
