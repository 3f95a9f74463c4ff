"""The door into diffusers' attention: one more backend in its dispatcher.

diffusers has no public extension point for attention backends (0.42), so the names below are
private; `check_diffusers` and tests/models/test_guard.py say clearly when a release moves them.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from nabla_attn.models.attend import attend
from nabla_attn.models.plan import Layer

BACKEND_NAME = "nabla"
_DISPATCH_ARGUMENTS = {"query", "key", "value", "attn_mask", "scale", "backend", "parallel_config"}


def check_diffusers() -> None:
    """Check the private diffusers names that the mechanism stands on.

    Raises:
        RuntimeError: this diffusers does not have one of them.
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


@lru_cache(maxsize=1)
def backend_member() -> Any:
    """The member of diffusers' AttentionBackendName that leads to `_nabla`, registered once.

    Raises:
        RuntimeError: this diffusers does not have the private names needed.
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
    return attend(
        _parallel_config, query, key, value, text_valid=text_valid_of(attn_mask, query), scale=scale
    )


def text_valid_of(attn_mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Read a key mask [batch or 1, 1, 1, tokens] as the validity of every token.

    Args:
        attn_mask: bool, or additive with -inf or a large negative number at padding.
        query: [batch, tokens, heads, dim].

    Returns:
        [batch, tokens] bool; None for no mask.

    Raises:
        ValueError: the mask differs between queries or heads.
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
