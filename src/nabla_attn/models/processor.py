"""The processor that stands in an attention module's place, and the backend that it calls.

Its class is a subclass of the module's own processor class, made once per class and holding
nothing, so that type checks and signatures of diffusers keep working; what belongs to one module
sits in the instance. The backend is one more in diffusers' dispatcher. diffusers has no public
extension point for attention backends (0.42), so the names at the end of this file are private;
`check_diffusers` and tests/models/test_diffusers_names.py say clearly when a release moves them.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nabla_attn.models.operator import attend_layer
from nabla_attn.models.plan import Layer

BACKEND_NAME = "nabla"
_DISPATCH_ARGUMENTS = {"query", "key", "value", "attn_mask", "scale", "backend", "parallel_config"}

# Given (original processor, layer), the callable that runs the layer when it is sparse.
Port = Callable[[Any, Layer], Callable[..., Any]]


class LayerPort:
    """Base of the ports: what runs a layer whose own processor bypasses diffusers' dispatcher.

    Subclasses are called as the processor is, with the attention module first.

    Args:
        original: The processor that the port stands in for.
        layer: The layer, with the plan of each forward.

    Attributes:
        runs_dense: Whether it runs dense layers too.
    """

    runs_dense = False

    def __init__(self, original: Any, layer: Layer) -> None:
        self.original = original
        self.layer = layer

    def refuse(self, **arguments: Any) -> None:
        """Check that arguments that a block map cannot follow were left out.

        Raises:
            ValueError: One of them was given.
        """
        given = [name for name, value in arguments.items() if value is not None]
        if given:
            raise ValueError(
                f"{self.layer.path}: NABLA in this model takes no {' and no '.join(given)}. Pass "
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


def dispatched(original: Any, layer: Layer) -> Any:
    """A copy of a processor that calls diffusers' dispatcher, and there the NABLA backend."""
    sparse = copy.copy(original)
    sparse._attention_backend = backend_member()
    sparse._parallel_config = layer
    return sparse


def make_processor(original: Any, layer: Layer, port: Port = dispatched) -> Any:
    """The stand-in for a layer's original processor.

    Raises:
        ValueError: The original holds weights, or no port fits and it does not call the dispatcher.
    """
    if isinstance(original, torch.nn.Module):
        raise ValueError(
            f"{layer.path}: processors with weights of their own cannot be replaced: got "
            f"{type(original).__name__}. Set a plain processor first."
        )
    if port is dispatched and not (
        hasattr(original, "_attention_backend") and hasattr(original, "_parallel_config")
    ):
        raise ValueError(
            f"{layer.path}: {type(original).__name__} does not go through diffusers' attention "
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
        current = self.layer.current
        is_original = current.is_dense and not getattr(self.sparse, "runs_dense", False)
        run = self.original if is_original else self.sparse
        if is_original or not current.takes_hidden:
            return run(attn, *args, **kwargs)
        current.hidden = args[0] if args else kwargs["hidden_states"]
        try:
            return run(attn, *args, **kwargs)
        finally:
            current.hidden = None

    return type(f"Nabla{base.__name__}", (NablaProcessor, base), {"__call__": call})


def check_diffusers() -> None:
    """Check the private diffusers names that the mechanism stands on.

    Raises:
        RuntimeError: This diffusers does not have one of them.
    """
    import inspect

    from diffusers import __version__
    from diffusers.models import attention_dispatch as module

    missing = [
        name
        for name in ("AttentionBackendName", "_AttentionBackendRegistry", "dispatch_attention_fn")
        if not hasattr(module, name)
    ]
    if not missing:
        registry = module._AttentionBackendRegistry
        missing = [name for name in ("register", "_backends") if not hasattr(registry, name)]
        arguments = inspect.signature(module.dispatch_attention_fn).parameters
        missing += sorted(_DISPATCH_ARGUMENTS - set(arguments))
    if missing:
        raise RuntimeError(
            f"diffusers {__version__} has changed what nabla_attn hooks into: "
            f"attention_dispatch lacks {missing}. Supported: diffusers >= 0.42; install 0.42.1."
        )


@functools.lru_cache(maxsize=1)
def backend_member() -> Any:
    """The member of diffusers' AttentionBackendName that stands for `_nabla`, registered once.

    Raises:
        RuntimeError: This diffusers does not have the private names needed.
    """
    check_diffusers()
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    # The enumeration is closed, so a new member is entered by hand.
    member = str.__new__(AttentionBackendName, BACKEND_NAME)
    member._name_ = BACKEND_NAME.upper()
    member._value_ = BACKEND_NAME
    AttentionBackendName._member_map_[member._name_] = member
    AttentionBackendName._member_names_.append(member._name_)
    AttentionBackendName._value2member_map_[BACKEND_NAME] = member
    _AttentionBackendRegistry.register(member, supports_context_parallel=True)(_nabla)
    return member


def _nabla(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """The registered function; a sparse layer reaches it through `parallel_config`."""
    if not isinstance(_parallel_config, Layer):
        raise ValueError(
            "the attention backend 'nabla' is not for set_attention_backend. Use "
            "nabla_attn.apply(pipeline_or_model, 'nabla-0.7')."
        )
    if is_causal or dropout_p:
        raise ValueError(
            f"block-sparse attention knows no causal order and no dropout: got {is_causal=}, "
            f"{dropout_p=}. Make the layer dense in the schedule (dense_layers)."
        )
    return attend_layer(
        _parallel_config, query, key, value, text_valid=text_valid_of(attn_mask, query), scale=scale
    )


def text_valid_of(attn_mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Read a key mask [batch or 1, 1, 1, tokens] as the validity of every token.

    Args:
        attn_mask: Bool, or additive with -inf or a large negative number at padding.
        query: [batch, tokens, heads, dim].

    Returns:
        [batch, tokens] bool; None for no mask.

    Raises:
        ValueError: The mask differs between queries or heads.
    """
    if attn_mask is None:
        return None
    if attn_mask.ndim == 2:
        attn_mask = attn_mask[:, None, None, :]
    if attn_mask.ndim != 4 or attn_mask.shape[1:3] != (1, 1):
        raise ValueError(
            "block-sparse attention takes masks of padded keys, [batch, 1, 1, tokens]: got "
            f"{tuple(attn_mask.shape)}. Make the layer dense in the schedule (dense_layers)."
        )
    valid = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -1e4
    return valid[:, 0, 0, :].expand(query.shape[0], -1)
