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

NUM_PLACES = 5
"""Numbers that describe a place: x, y, their squares, and time."""

Grid = tuple[int, ...]


def places(grid: Grid) -> Tensor:
    """Where the tokens of a grid (frames, rows, columns) lie, [tokens, NUM_PLACES].

    Coordinates run from about -1 to 1 over the grid. Squares, less their mean of a third, are
    distances from the middle: near an edge they are known before the side is.
    """
    time, y, x = torch.meshgrid(*(_axis(length) for length in grid), indexing="ij")
    return torch.stack([x, y, x.square() - 1 / 3, y.square() - 1 / 3, time], -1).flatten(0, 2)


def _axis(length: int) -> Tensor:
    return (2 * torch.arange(length) + 1 - length) / length


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
        """Mean squared error of the places of the last call, summed over their numbers.

        Args:
            grid: Frames, rows and columns of its tokens. A single frame has no place in time.
        """
        assert self._seen is not None, "the model was called"
        hidden = F.layer_norm(self._seen.float(), self._seen.shape[-1:])
        self._seen = None
        error = (self._linear(hidden) - places(grid).to(hidden.device)).square().mean((0, 1))
        return error.sum() if grid[0] > 1 else error[:-1].sum()

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
