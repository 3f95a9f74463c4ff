"""The hook that has each forward of a model planned."""

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nabla_attn.models.modules import unwrap

if TYPE_CHECKING:
    from nabla_attn.models.state import ModelState

STATE_NAME = "_nabla_attn"


class PlanForward:
    """Forward pre-hook; holds nothing, so copies of a model use their own state."""

    @torch.compiler.disable(
        reason="apply NABLA after torch.compile(model, fullgraph=True), or compile repeated blocks"
    )
    def __call__(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Plan the forward; drop arguments of the model's own sparsity."""
        # Wrappers pass their arguments on.
        model = unwrap(module)
        state: "ModelState" = getattr(model, STATE_NAME)
        arguments = _by_name(model, args, kwargs)
        state.plan(model, arguments)
        without = [name for name in state.row.without if arguments.get(name) is not None]
        if not without:
            return None
        # A positional argument cannot be left out, so all are passed by name.
        return (), arguments | dict.fromkeys(without)


def _by_name(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a model's forward by name, those of its `**kwargs` included."""
    signature = inspect.signature(type(model).forward)
    bound = signature.bind_partial(model, *args, **kwargs).arguments
    arguments = dict(list(bound.items())[1:])
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    return arguments
