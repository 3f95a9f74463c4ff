"""Muon for the hidden weights of a network and AdamW for the rest, as one optimiser."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from nabla_attn.moving_shapes.recipe import OptimConfig


class MuonWithAdamW:
    """Step `torch.optim.Muon` on hidden weights and `torch.optim.AdamW` on all others.

    Muon takes matrices only, so a convolution's kernel is stepped through a view
    [out, in * taps] that shares its memory.

    Args:
        module: The network to train.
        is_hidden: (name, parameter) -> whether Muon takes it.
        config: Learning rates and weight decay.
    """

    def __init__(
        self,
        module: nn.Module,
        is_hidden: Callable[[str, nn.Parameter], bool],
        config: OptimConfig,
    ) -> None:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        self._hidden = [p for name, p in named if is_hidden(name, p)]
        self._views = [nn.Parameter(p.detach().view(len(p), -1)) for p in self._hidden]
        rest = [p for name, p in named if not is_hidden(name, p)]
        self._optimizers: list[tuple[torch.optim.Optimizer, float]] = []
        if self._views:
            muon = torch.optim.Muon(
                self._views, lr=config.muon_lr, weight_decay=config.muon_weight_decay
            )
            self._optimizers.append((muon, config.muon_lr))
        adamw = torch.optim.AdamW(rest, lr=config.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0)
        self._optimizers.append((adamw, config.adamw_lr))

    def step(self, scale: float) -> None:
        """Take one step with every learning rate multiplied by `scale`, and drop the gradients."""
        for view, parameter in zip(self._views, self._hidden, strict=True):
            view.grad = None if parameter.grad is None else parameter.grad.view_as(view)
        for optimizer, rate in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
            optimizer.step()
        for parameter in (*self.parameters, *self._views):
            parameter.grad = None

    def state_dict(self) -> list[dict[str, Any]]:
        """State of both optimisers."""
        return [optimizer.state_dict() for optimizer, _ in self._optimizers]

    def load_state_dict(self, states: Iterable[dict[str, Any]]) -> None:
        """Take up a state given by `state_dict`."""
        for (optimizer, _), state in zip(self._optimizers, states, strict=True):
            optimizer.load_state_dict(state)
