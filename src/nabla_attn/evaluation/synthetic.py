"""A fixed synthetic set of attention calls, shaped like those of a large model.

Tokens are those of 77 frames of 480x832 pixels in Wan 2.1's latents: 20 frames of 30 rows and 52
columns. Queries and keys are random Fourier features, whose products are bell curves of a distance;
each head has its own idea of distance:

- `local`: places a few tokens apart in time, height and width.
- `temporal`: the same place in all frames.
- `global`: places of like content, wherever they are. Content is a few smooth random fields.

Both get noise of their own, which falls over the steps while the features stay; values are smooth
fields with noise. All of it follows from the sample's number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import pi, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nabla_attn.config import SparseConfig
from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.order import TokenLayout
from nabla_attn.evaluation.calls import Call, Series, Tables, add_call
from nabla_attn.methods import Moment
from nabla_attn.methods.calibration import TableMaker
from nabla_attn.record import RunRecord, check_settings, collect_versions, describe_device

GRID = TokenGrid(frames=20, height=30, width=52)
DIM, STEPS = 128, 3
NEAR = (1, 4, 4)
"""Frames, rows and columns to each side that count as near."""
LAYERS, NUM_LAYERS = (5, 12, 19), 30
"""Layers that the samples stand for in turn: of every remainder by 3, even and odd."""

HEADS = {"local": (2.0, 3.0, 3.0), "temporal": (24.0, 1.5, 1.5), "global": None}
"""Kind of a head -> the length of its bell curve in frames, rows and columns; None is content."""
CONTENT_FIELDS, CONTENT_LENGTHS, CONTENT_WIDTH = 4, (12.0, 8.0, 8.0), 0.5
VALUE_LENGTHS = (6.0, 4.0, 4.0)
GAIN = 11.0
"""The score of a token with itself, noise aside."""
SHARES_OF_NOISE = (0.4, 0.2)
"""Share of noise in q and k in the first step and in the last."""
TABLE_SAMPLE = 1_000_000
"""Number of the sample that calibrates; none is measured under it."""


@dataclass(frozen=True)
class SyntheticCalls:
    """Calls of one layer through some steps, a sample in the place of a prompt.

    Attributes:
        grid: The tokens.
        dim: Dimensions of a head.
        steps: Denoising steps.
        heads: Kinds of heads, of `HEADS`.
    """

    grid: TokenGrid = GRID
    dim: int = DIM
    steps: int = STEPS
    heads: tuple[str, ...] = tuple(HEADS)

    @property
    def seed(self) -> int:
        """The seed; samples have their numbers instead."""
        return 0

    @property
    def device(self) -> str:
        """The machine's name."""
        return describe_device("cpu")

    @property
    def head_names(self) -> Sequence[str]:
        """The kinds of the heads."""
        return self.heads

    @property
    def knob_prompts(self) -> int:
        """One: samples differ by chance alone."""
        return 1

    def describe(self, number: int) -> dict[str, Any]:
        """The shape and the sample."""
        return {
            "data": "synthetic",
            "tokens": [self.grid.frames, self.grid.height, self.grid.width],
            "dim": self.dim,
            "steps": self.steps,
            "heads": list(self.heads),
            "gain": GAIN,
            "noise": list(SHARES_OF_NOISE),
            "sample": number,
        }

    def collect(self, number: int) -> list[Series]:
        """The calls of a sample."""
        return [self._series(number, LAYERS[number % len(LAYERS)])]

    def make_tables(self, config: SparseConfig) -> Tables:
        """Calibrate each layer on a sample that is not measured."""
        maker = TableMaker(config.uses)
        for layer in LAYERS:
            for call in self._series(TABLE_SAMPLE, layer):
                add_call(maker, call, config)
        return {maker.use.name: maker.entries()}

    def _series(self, number: int, layer: int) -> Series:
        generator = torch.Generator().manual_seed(number)
        features = torch.stack([self._features(kind, generator) for kind in self.heads])
        values = [self._fields(self.dim, VALUE_LENGTHS, generator) for _ in self.heads]
        v = torch.stack(values)
        calls = []
        for step in range(self.steps):
            share = self._noise(step)
            moment = Moment(step=step, num_steps=self.steps, layer=layer, num_layers=NUM_LAYERS)
            q, k = (self._noisy(features, share, generator) for _ in range(2))
            value = sqrt(1 - share) * v + sqrt(share) * torch.randn(v.shape, generator=generator)
            calls.append(Call(q[None], k[None], value[None], TokenLayout(self.grid), moment))
        return calls

    def _noise(self, step: int) -> float:
        first, last = SHARES_OF_NOISE
        return first + (last - first) * step / max(1, self.steps - 1)

    def _noisy(self, features: Tensor, share: float, generator: torch.Generator) -> Tensor:
        """Queries or keys whose score with themselves, noise aside, is GAIN times 1 - share."""
        noise = torch.randn(features.shape, generator=generator) / sqrt(self.dim)
        mixed = sqrt(1 - share) * features + sqrt(share) * noise
        return mixed * sqrt(GAIN * sqrt(self.dim))

    def _features(self, kind: str, generator: torch.Generator) -> Tensor:
        """Unit vectors [tokens, dim] whose products are bell curves of the head's distance."""
        lengths = HEADS[kind]
        if lengths is None:
            place = self._fields(CONTENT_FIELDS, CONTENT_LENGTHS, generator) / CONTENT_WIDTH
        else:
            place = self._places() / torch.tensor(lengths)
        return fourier(place, self.dim, generator) / sqrt(self.dim)

    def _fields(
        self, count: int, lengths: tuple[float, float, float], generator: torch.Generator
    ) -> Tensor:
        """Smooth random fields [tokens, count] of mean 0 and variance 1, by sums of waves."""
        waves = fourier(self._places() / torch.tensor(lengths), 64, generator)
        return waves @ torch.randn(64, count, generator=generator) / 8

    def _places(self) -> Tensor:
        """Frame, row and column of every token, [tokens, 3]."""
        sides = (self.grid.frames, self.grid.height, self.grid.width)
        return torch.cartesian_prod(*(torch.arange(side).float() for side in sides))


def fourier(place: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random Fourier features [tokens, count] of Rahimi and Recht (2007), variance 1 each.

    The mean product of two tokens' features is exp(-|x - y|² / 2).

    Args:
        place: Coordinates [tokens, axes], over the lengths of the bell curve.
        count: Number of features.
        generator: Draws them.
    """
    frequencies = torch.randn(place.shape[1], count, generator=generator)
    phases = 2 * pi * torch.rand(count, generator=generator)
    return sqrt(2) * torch.cos(place @ frequencies + phases)


def locality(call: Call, near: tuple[int, int, int] = NEAR) -> list[dict[str, float]]:
    """How local each head's exact attention is, means over the measured query tokens.

    Args:
        call: The call, without text.
        near: Frames, rows and columns to each side that count as near.

    Returns:
        For each head `entropy` and `uniform`, that of even attention, in bits; `near`, the mass
        within that distance; `same_place`, that at the same row and column of any frame; and
        `top_1` to `top_20`, that in this percentage of key blocks, the highest of each query block.
    """
    grid, layout = call.layout.grid, call.layout
    sides = (grid.frames, grid.height, grid.width)
    place = torch.cartesian_prod(*(torch.arange(side) for side in sides)).short()
    heads, total = call.q.shape[1], len(call.rows)
    sums = torch.zeros(heads, 3, dtype=torch.float64)
    for head, rows, probs in call.panels():
        apart = (place[rows][:, None] - place[None]).abs()
        entropy = -(probs * probs.clamp_min(1e-30).log2()).sum()
        is_near = (apart <= torch.tensor(near).short()).all(dim=2)
        is_same = (apart[..., 1:] == 0).all(dim=2)
        found = [entropy, (probs * is_near).sum(), (probs * is_same).sum()]
        sums[head] += torch.stack(found)
    mass = call.block_mass(layout).sort(dim=2, descending=True).values.sum(dim=1) / total
    result = []
    for head in range(heads):
        numbers = dict(zip(("entropy", "near", "same_place"), sums[head] / total, strict=True))
        for percent in (1, 5, 10, 20):
            count = max(1, round(percent / 100 * layout.num_blocks))
            numbers[f"top_{percent}"] = mass[head, :count].sum()
        numbers["uniform"] = torch.tensor(float(grid.num_tokens)).log2()
        result.append({name: round(float(value), 4) for name, value in numbers.items()})
    return result


def record_locality(source: SyntheticCalls, path: Path) -> None:
    """Record the locality of the first sample's first and last call, unless it is there."""
    config = source.describe(0) | {"near": list(NEAR)}
    if path.is_file():
        check_settings(path, config)
        return
    (calls,) = source.collect(0)
    numbers = {
        str(call.moment.step): dict(zip(source.heads, locality(call), strict=True))
        for call in (calls[0], calls[-1])
    }
    versions, device = collect_versions(), source.device
    RunRecord("locality", config, 0, versions, device, {"steps": numbers}).save(path)
