"""NABLA in one model: its processors, the hook that plans each forward, and their removal."""

import inspect
from typing import Any, cast
from weakref import ref

import torch
from torch import nn

from nabla_attn.models.checkpointing import unwrap_checkpoint, wrap_checkpoint
from nabla_attn.models.method_parts import LayerParts, attach, detach
from nabla_attn.models.modules import set_processor, unwrap
from nabla_attn.models.planner import Planner
from nabla_attn.models.processor import NablaProcessor, dispatched, make_processor

STATE_NAME = "_nabla_attn"
"""The attribute of a model that holds its `AppliedModel`; copies of the model get their own."""


class AppliedModel:
    """Everything NABLA keeps about one model.

    Args:
        planner: What plans the model's forwards.

    Attributes:
        parts: Trained parts of methods that are in the model for as long as this is applied.
    """

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        self.hook: Any = None
        self.has_own_cp_plan = False
        self.parts: LayerParts = {}
        self._parts_before: LayerParts = {}
        self._hooked: ref[nn.Module] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy does not belong to the original's wrapper.
        return self.__dict__ | {"_hooked": None}

    def install(self, model: nn.Module, hooked: nn.Module) -> None:
        """Replace the processors and hook the forward of `hooked`, `model` or its wrapper.

        Raises:
            ValueError: A processor cannot be replaced; the model is left as it was.
        """
        setattr(model, STATE_NAME, self)
        self._hooked = ref(hooked)
        self.hook = hooked.register_forward_pre_hook(PlanForward(), with_kwargs=True)
        try:
            self.place_processors()
        except ValueError:
            self.uninstall(model)
            raise
        self._parts_before = attach(model, self.parts)
        row = self.planner.row
        cp_plan = row.cp_plan(model) if row.cp_plan is not None else None
        if cp_plan is not None and "_cp_plan" not in vars(model):
            # Seen by `enable_parallelism` instead of the class's own.
            cast(Any, model)._cp_plan = cp_plan
            self.has_own_cp_plan = True

    def add_parts(self, model: nn.Module, parts: LayerParts) -> None:
        """Put trained parts into the model it is applied to, until `uninstall`."""
        for path, mine in parts.items():
            self.parts.setdefault(path, {}).update(mine)
        attach(model, parts)

    def install_again(self, model: nn.Module) -> None:
        """Install again what `uninstall` removed, on the same model or wrapper."""
        hooked = self._hooked() if self._hooked is not None else None
        self.install(model, model if hooked is None else hooked)

    def uninstall(self, model: nn.Module) -> None:
        """Restore the model: processors, hook, parts, checkpointing, context-parallel plan."""
        self.hook.remove()
        for layer, module in self.planner.pairs:
            layer.maps.forget()
            # Who kept the processor may put it back.
            layer.current.is_dense = True
            if isinstance(module.processor, NablaProcessor):
                set_processor(module, module.processor.original)
        unwrap_checkpoint(model)
        detach(model, self.parts)
        attach(model, self._parts_before)
        if self.has_own_cp_plan:
            delattr(model, "_cp_plan")
            self.has_own_cp_plan = False
        delattr(model, STATE_NAME)

    def plan(self, model: nn.Module, arguments: dict[str, Any]) -> None:
        """Prepare a forward of the model with these arguments."""
        self.place_processors()
        if torch.is_grad_enabled():
            wrap_checkpoint(model, self.planner.layers, list(self.planner.modules.values()))
        self.planner.plan(model, arguments)

    def place_processors(self) -> None:
        """Replace every processor that is not ours (users and fused QKV set new ones)."""
        for layer, module in self.planner.pairs:
            original = module.processor
            if isinstance(original, NablaProcessor):
                if original.layer is layer:
                    continue
                # Of an earlier `apply`, put back by who kept it (unfused QKV).
                original = original.original
            port = self.planner.row.ports.get(type(original).__name__, dispatched)
            set_processor(module, make_processor(original, layer, port))


def applied_to(model: nn.Module) -> AppliedModel | None:
    """What is applied to a model; None where nothing is."""
    return model.__dict__.get(STATE_NAME)


class PlanForward:
    """A pre-forward hook that plans the forward before the model sees its tokens.

    It is one of torch's own hooks and not one of diffusers' registry, which replaces `forward`: a
    pre-hook can sit on the wrapper of a compiled model, so that its graph stays whole, and leaves
    nothing behind when it is removed.
    """

    @torch.compiler.disable(
        reason="apply NABLA after torch.compile(model, fullgraph=True), or compile repeated blocks"
    )
    def __call__(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Plan the forward; drop arguments of the model's own sparsity."""
        # Wrappers pass their arguments on.
        model = unwrap(module)
        applied = applied_to(model)
        assert applied is not None
        arguments = _by_name(model, args, kwargs)
        applied.plan(model, arguments)
        without = applied.planner.row.without
        if all(arguments.get(name) is None for name in without):
            return None
        # A positional argument cannot be left out, so all are passed by name.
        return (), arguments | {name: None for name in without if arguments.get(name) is not None}


def _by_name(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a model's forward by name, those of its `**kwargs` included."""
    signature = inspect.signature(type(model).forward)
    bound = signature.bind_partial(model, *args, **kwargs).arguments
    arguments = dict(list(bound.items())[1:])
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    return arguments
