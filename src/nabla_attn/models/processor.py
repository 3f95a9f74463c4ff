"""The processor that stands in an attention module's place.

Its class is a subclass of the module's own processor class, made once per class and holding
nothing, so that type checks and signatures of diffusers keep working; what belongs to one module
sits in the instance.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch

from nabla_attn.models.dispatch import backend_member
from nabla_attn.models.plan import Layer

# Given (original processor, layer), the callable that runs the layer when it is sparse.
Port = Callable[[Any, Layer], Callable[..., Any]]


class LayerPort:
    """Base of the ports: what runs a layer whose own processor leaves no door.

    Subclasses are called as the processor is, with the attention module first.

    Args:
        original: the processor that the port stands in for.
        layer: the layer, with the plan of each forward.

    Attributes:
        runs_dense: whether it runs dense layers too.
    """

    runs_dense = False

    def __init__(self, original: Any, layer: Layer) -> None:
        self.original = original
        self.layer = layer

    def refuse(self, **arguments: Any) -> None:
        """Check that arguments that a block map cannot follow were left out.

        Raises:
            ValueError: one of them was given.
        """
        given = [name for name, value in arguments.items() if value is not None]
        if given:
            raise ValueError(
                f"{self.layer.name}: NABLA in this model takes no {' and no '.join(given)}. Pass "
                "None, or make the layers dense in the schedule (dense_layers)."
            )


class NablaProcessor:
    """Runs the original processor when its layer is dense, and the sparse one otherwise.

    Settings that users make on it (`set_attention_backend`, `enable_parallelism`) go to the
    original, where dense layers use them and `remove` leaves them.
    """

    original: Any
    layer: Layer
    port: Port
    sparse: Callable[..., Any]

    @property
    def _attention_backend(self) -> Any:
        return self.original._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.original._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return self.original._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.original._parallel_config = config

    def __reduce__(self) -> tuple:
        # The class itself cannot be pickled; it is made again from the original's.
        return _blank, (type(self.original),), (self.original, self.layer, self.port)

    def __setstate__(self, state: tuple[Any, Layer, Port]) -> None:
        self.original, self.layer, self.port = state
        self.sparse = self.port(self.original, self.layer)


def open_door(original: Any, layer: Layer) -> Any:
    """A copy of a processor that calls diffusers' dispatcher, led to the NABLA backend."""
    sparse = copy.copy(original)
    sparse._attention_backend = backend_member()
    sparse._parallel_config = layer
    return sparse


def make_processor(original: Any, layer: Layer, port: Port = open_door) -> Any:
    """The stand-in for a layer's original processor.

    Raises:
        ValueError: the original holds weights, or no port fits and it has no door.
    """
    if isinstance(original, torch.nn.Module):
        raise ValueError(
            f"{layer.name}: processors with weights of their own cannot be replaced: got "
            f"{type(original).__name__}. Set a plain processor first."
        )
    if port is open_door and not (
        hasattr(original, "_attention_backend") and hasattr(original, "_parallel_config")
    ):
        raise ValueError(
            f"{layer.name}: {type(original).__name__} does not go through diffusers' attention "
            "dispatcher. Give its row a port (nabla_attn.register_model(..., ports=...))."
        )
    processor = _blank(type(original))
    processor.__setstate__((original, layer, port))
    return processor


def _blank(base: type) -> Any:
    cls: Any = _class_for(base)
    return cls.__new__(cls)


@functools.cache
def _class_for(base: type) -> type:
    # Attention modules drop arguments that the processor's signature does not name.
    @functools.wraps(base.__call__)  # type: ignore[operator]
    def call(self: Any, attn: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        is_original = self.layer.is_dense and not getattr(self.sparse, "runs_dense", False)
        run = self.original if is_original else self.sparse
        return run(attn, *args, **kwargs)

    return type(f"Nabla{base.__name__}", (NablaProcessor, base), {"__call__": call})
