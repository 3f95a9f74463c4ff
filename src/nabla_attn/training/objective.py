"""Objectives: flow matching, and distillation of a dense teacher into a sparse student.

An objective takes any module and a batch; it knows no model family.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nabla_attn.training.noise import NoisePath, noise_batch

# (noisy latents, timestep, conditions) -> the module's arguments; a family's `inputs`.
Inputs = Callable[[Tensor, Tensor, dict[str, Tensor]], dict[str, Any]]
# Enters the dense teacher: a frozen copy, or the student itself without adapters.
Teacher = Callable[[], AbstractContextManager[nn.Module]]
Terms = dict[str, Tensor]


class Objective(Protocol):
    """A loss to minimise.

    Attributes:
        path: Noise levels and targets.
        inputs: Function that makes the module's arguments.
    """

    path: NoisePath
    inputs: Inputs

    def __call__(
        self, module: nn.Module, batch: dict[str, Any], generator: torch.Generator
    ) -> Terms:
        """The terms of the loss; "loss" is their weighted sum, which is minimised."""


class FlowMatching:
    """Mean squared error of the predicted velocity against the data's own.

    Args:
        path: Noise levels and targets.
        inputs: Function that makes the module's arguments.
    """

    def __init__(self, path: NoisePath, inputs: Inputs) -> None:
        self.path = path
        self.inputs = inputs

    def __call__(
        self, module: nn.Module, batch: dict[str, Any], generator: torch.Generator
    ) -> Terms:
        """The terms {"loss"}, float32 scalars.

        Args:
            module: The transformer, or a wrapper with its arguments.
            batch: {"latents": [batch, ...], "conditions": dict of [batch, ...]}.
            generator: Generator of the CPU that noise and levels are drawn from.
        """
        noised = noise_batch(self.path, batch, generator)
        arguments = self.inputs(noised.latents, noised.timestep, batch["conditions"])
        return {"loss": squared_error(predict(module, arguments), noised.target, noised.weight)}


class Distillation:
    """Mean squared error of the student against a dense teacher on the same noisy input.

    Source: arXiv:2507.13546, section 4.1, where both extra weights are 0 and guidance is 1.

    Args:
        path: Noise levels and targets.
        inputs: Function that makes the module's arguments.
        teacher: Function that enters the dense teacher.
        data_weight: Weight of the flow-matching term.
        layer_weight: Weight of the attention outputs' error, the mean over layers.
        layers: Paths of the attention modules, the same in teacher and student.
        student: The module that has `layers`, inside any wrapper; needed with a layer weight.
        guidance: Scale of classifier-free guidance in the teacher's prediction; unless it is 1, a
            batch also has "empty", the conditions of the empty caption.
        parts: Number of processes that share a sequence. Each sees its part of an attention
            output, while predictions are whole.
    """

    def __init__(
        self,
        path: NoisePath,
        inputs: Inputs,
        teacher: Teacher,
        *,
        data_weight: float = 0.0,
        layer_weight: float = 0.0,
        layers: Sequence[str] = (),
        student: nn.Module | None = None,
        guidance: float = 1.0,
        parts: int = 1,
    ) -> None:
        self.path = path
        self.inputs = inputs
        self.teacher = teacher
        self.data_weight = data_weight
        self.layer_weight = layer_weight
        self.layers = tuple(layers)
        self.student = student
        self.guidance = guidance
        self.parts = parts

    def __call__(
        self, module: nn.Module, batch: dict[str, Any], generator: torch.Generator
    ) -> Terms:
        """The terms {"loss", "distillation"} and those asked for: "data", "layers"."""
        noised = noise_batch(self.path, batch, generator)
        arguments = self.inputs(noised.latents, noised.timestep, batch["conditions"])
        with torch.no_grad(), self.teacher() as teacher:
            wanted, wanted_layers = self._predict(teacher, teacher, arguments)
            if self.guidance != 1:
                arguments_free = self.inputs(noised.latents, noised.timestep, batch["empty"])
                free = predict(teacher, arguments_free)
                wanted = free + self.guidance * (wanted - free)
        student = module if self.student is None else self.student
        predicted, layers = self._predict(module, student, arguments)
        terms = {"distillation": squared_error(predicted, wanted, noised.weight)}
        loss = terms["distillation"]
        if self.data_weight:
            terms["data"] = squared_error(predicted, noised.target, noised.weight)
            loss = loss + self.data_weight * terms["data"]
        if self.layer_weight:
            errors = [squared_error(a, b) for a, b in zip(layers, wanted_layers, strict=True)]
            terms["layers"] = torch.stack(errors).mean()
            # The gradients of the parts are summed, so each counts as its share of the mean.
            share = terms["layers"] / self.parts
            loss = loss + self.layer_weight * (share + (terms["layers"] - share).detach())
        return {"loss": loss} | terms

    def _predict(
        self, module: nn.Module, inner: nn.Module, arguments: dict[str, Any]
    ) -> tuple[Tensor, list[Tensor]]:
        """The prediction, and the output of every attention layer where it counts."""
        outputs: list[Tensor] = []
        with ExitStack() as hooks:
            for path in self.layers if self.layer_weight else ():
                hook = inner.get_submodule(path).register_forward_hook(
                    lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out)
                )
                hooks.callback(hook.remove)
            return predict(module, arguments), outputs


def predict(module: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """The first output of a transformer of diffusers."""
    out = module(**arguments, return_dict=False)
    # Kandinsky 5 gives the tensor itself.
    predicted: Tensor = out[0] if isinstance(out, tuple) else out
    return predicted


def squared_error(predicted: Tensor, wanted: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error in float32, or in float64 where the inputs are.

    Args:
        predicted: Predictions of any shape.
        wanted: Targets of the same shape.
        weight: Weight of each entry in the mean; broadcasts to `predicted`. None is 1.
    """
    kind = torch.promote_types(predicted.dtype, torch.float32)
    errors = (predicted.to(kind) - wanted.to(kind)).square()
    if weight is None:
        return errors.mean()
    weight = weight.to(kind).expand_as(errors)
    return (errors * weight).sum() / weight.sum()
