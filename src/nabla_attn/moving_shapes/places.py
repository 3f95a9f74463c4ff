"""Teaching a transformer where in a video each of its tokens lies.

Rotary embeddings tell attention how far apart two tokens are, never where they are, and at full
noise the input says nothing about it either: such a model cannot know what belongs in the middle
of a frame. But attention at an edge averages over fewer tokens, and the noise in the mean is
larger there. A linear probe of hidden states, trained with the model, teaches it to read that.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

BLOCK = 2
"""Index of the block whose output the probe reads; the blocks after it use what it learnt."""

WAVES = (0.5, 1, 2, 4)
"""Waves an axis is described by, in periods over its length. The first tells one end from the
other, the last, of 8 tokens where a frame is 32 tokens wide, neighbours from each other."""

NUM_PLACES = 3 * (2 * len(WAVES) - 1)
"""Numbers that describe a place: those of time, y and x."""

Grid = tuple[int, ...]


def places(grid: Grid) -> Tensor:
    """Where the tokens of a grid (frames, rows, columns) lie, [tokens, NUM_PLACES].

    Every axis is described by cosines and sines of its length, all of them between -1 and 1.
    """
    axes = torch.meshgrid(*(_axis(length) for length in grid), indexing="ij")
    return torch.cat([_describe(axis.flatten()) for axis in axes], -1)


def _axis(length: int) -> Tensor:
    """Centres of a line of tokens, as shares of its length."""
    return (torch.arange(length) + 0.5) / length


def _describe(share: Tensor) -> Tensor:
    angles = 2 * torch.pi * share[:, None] * torch.tensor(WAVES)
    return torch.cat([angles.cos(), angles[:, 1:].sin()], -1)


class PlaceProbe:
    """A linear probe of one block's output.

    Args:
        hidden: The module whose output [batch, tokens, dim] is read.
        linear: The probe, from dim to NUM_PLACES.
    """

    def __init__(self, hidden: nn.Module, linear: nn.Linear) -> None:
        self._linear = linear
        self._seen: Tensor | None = None
        self._hook = hidden.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self._seen = output

    def loss(self, grid: Grid) -> Tensor:
        """Mean squared error of the places of the last call.

        Args:
            grid: Frames, rows and columns of its tokens.
        """
        assert self._seen is not None, "the model was called"
        hidden = F.layer_norm(self._seen.float(), self._seen.shape[-1:])
        self._seen = None
        return (self._linear(hidden) - places(grid).to(hidden.device)).square().mean()

    def remove(self) -> None:
        """Read no more."""
        self._hook.remove()


@contextmanager
def place_probe(model: WanTransformer3DModel) -> Iterator[PlaceProbe]:
    """Give a model a probe while it is trained; its weights are trained with the model's."""
    width = model.config.num_attention_heads * model.config.attention_head_dim
    linear = nn.Linear(width, NUM_PLACES)
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)  # the same in every run
    model.place_probe = linear.to(model.device)
    probe = PlaceProbe(model.blocks[BLOCK], model.place_probe)
    try:
        yield probe
    finally:
        probe.remove()
        del model.place_probe
