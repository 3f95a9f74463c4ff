"""Recorded block maps: what is kept of a run, in one small safetensors file.

Maps bit-packed, scores of the pooled map in a byte each, for chosen steps, layers and heads;
density and losses for all of them.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nabla_attn.core.grid import BlockShape, TokenGrid
from nabla_attn.files import parse_json, whole_file
from nabla_attn.validation import check_values

SCHEMA = 1
MAX_BYTES = 3_300_000
"""Bytes of recorded maps: what fits the viewer's page."""

SCORE_BITS = 24
"""A score of 2**-24 and less is byte 0, a score of 1 is byte 255, logarithmic between."""

STEPS, LAYERS = 5, 6  # recorded when nothing is asked for, where they fit


@dataclass(frozen=True)
class Selection:
    """What is recorded.

    Attributes:
        steps: Denoising steps.
        layers: Attention layers.
        heads: Heads.
        has_scores: Whether the scores of the pooled map are recorded too.
    """

    steps: tuple[int, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    has_scores: bool = True

    def num_bytes(self, num_blocks: int) -> int:
        """Bytes of the recorded maps."""
        row = -(-num_blocks // 8) + (num_blocks if self.has_scores else 0)
        return len(self.steps) * len(self.layers) * len(self.heads) * num_blocks * row


def choose_recorded(
    counts: tuple[int, int, int],
    num_blocks: int,
    *,
    steps: tuple[int, ...] | None = None,
    layers: tuple[int, ...] | None = None,
    heads: tuple[int, ...] | None = None,
    has_scores: bool = True,
    max_bytes: int = MAX_BYTES,
) -> Selection:
    """Complete a selection: what was not asked for is spread evenly, as much as fits.

    Args:
        counts: Steps, layers and heads of the run.
        num_blocks: Blocks of the video.
        steps: Steps to record.
        layers: Layers to record.
        heads: Heads to record.
        has_scores: Record scores too.
        max_bytes: Limit of the recorded maps.

    Raises:
        ValueError: An index is outside the run, or what was asked for is larger than the limit.
    """
    asked = (steps, layers, heads)
    for name, wanted, count in zip(("step", "layer", "head"), asked, counts, strict=True):
        if wanted is not None and (not wanted or not all(0 <= index < count for index in wanted)):
            raise ValueError(f"{name}s to record must be in 0 to {count - 1}: got {list(wanted)}.")
    limits = [min(STEPS, counts[0]), min(LAYERS, counts[1]), counts[2]]
    while True:
        chosen = [
            tuple(sorted(set(wanted))) if wanted is not None else spread(count, limit)
            for wanted, count, limit in zip(asked, counts, limits, strict=True)
        ]
        selection = Selection(chosen[0], chosen[1], chosen[2], has_scores)
        if selection.num_bytes(num_blocks) <= max_bytes:
            return selection
        shrinkable = [i for i in range(3) if asked[i] is None and limits[i] > 1]
        if not shrinkable:
            raise ValueError(
                f"the maps would take {selection.num_bytes(num_blocks):,} bytes and the limit is "
                f"{max_bytes:,}: {num_blocks} blocks, {len(selection.steps)} steps, "
                f"{len(selection.layers)} layers, {len(selection.heads)} heads. Record fewer of "
                "them, or no scores."
            )
        limits[max(shrinkable, key=limits.__getitem__)] -= 1


def spread(count: int, limit: int) -> tuple[int, ...]:
    """At most `limit` of the indices below `count`, evenly, first and last included."""
    return tuple(int(i) for i in np.unique(np.linspace(0, count - 1, min(limit, count)).round()))


@dataclass(frozen=True)
class RecordedMaps:
    """What a recording holds.

    Attributes:
        algorithm: The algorithm string.
        blocks: Blocks along (frames, height, width).
        block: Tokens of a block along (frames, height, width).
        grid: Tokens along (frames, height, width).
        selection: The recorded steps, layers and heads.
        masks: uint8 [steps, layers, heads, blocks, bytes], highest bit first; dense is all ones.
        scores: uint8 [steps, layers, heads, blocks, blocks], see `SCORE_BITS`; empty when absent.
        density: Fp32 [all steps, all layers, all heads]; 1 where dense.
        true_mass: Like density, from sampled rows.
        best_mass: Like density: the most that this density could keep.
    """

    algorithm: str
    blocks: tuple[int, int, int]
    block: tuple[int, int, int]
    grid: tuple[int, int, int]
    selection: Selection
    masks: torch.Tensor
    scores: torch.Tensor
    density: torch.Tensor
    true_mass: torch.Tensor
    best_mass: torch.Tensor

    @property
    def num_blocks(self) -> int:
        """Blocks of the video."""
        return self.blocks[0] * self.blocks[1] * self.blocks[2]

    def mask(self, step: int, layer: int, head: int) -> np.ndarray:
        """The map of recorded indices (not step numbers): bool [blocks, blocks]."""
        packed = self.masks[step, layer, head].numpy()
        return np.unpackbits(packed, axis=-1, count=self.num_blocks).astype(bool)

    def save(self, path: str | Path) -> None:
        """Write the recording, whole or not at all."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        tensors = {k: v.contiguous() for k, v in values.items() if isinstance(v, torch.Tensor)}
        plain = {k: v for k, v in values.items() if k not in tensors} | {"schema": SCHEMA}
        plain["selection"] = asdict(self.selection)
        with whole_file(path) as temporary:
            save_file(tensors, temporary, metadata={"maps": json.dumps(plain)})

    @classmethod
    def load(cls, path: str | Path) -> "RecordedMaps":
        """Read a recording.

        Raises:
            ValueError: Missing, damaged, or not a recording; the file is named.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                plain = parse_json((file.metadata() or {})["maps"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if plain.pop("schema") != SCHEMA:
                raise ValueError("it is of another version of nabla-attn")
            chosen = plain.pop("selection")
            steps, layers, heads = (tuple(chosen[name]) for name in ("steps", "layers", "heads"))
            plain["selection"] = Selection(steps, layers, heads, chosen["has_scores"])
            plain |= {name: tuple(plain[name]) for name in ("blocks", "block", "grid")}
            maps = cls(**plain, **tensors)
            check_values(maps.selection)
            check_values(maps)
            _check(maps)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ValueError(f"cannot read the maps {path}: {reason}.") from error
        return maps


def _check(maps: RecordedMaps) -> None:
    """Hold sizes, dtypes and indices of a recording against one another."""
    grid = TokenGrid(*maps.grid, block=BlockShape(*maps.block))
    if grid.blocks != maps.blocks:
        raise ValueError(f"{grid} has {grid.blocks} blocks, not {maps.blocks}")
    if {maps.masks.dtype, maps.scores.dtype} != {torch.uint8}:
        raise ValueError("masks and scores must be bytes")
    if {maps.density.dtype, maps.true_mass.dtype, maps.best_mass.dtype} != {torch.float32}:
        raise ValueError("densities and masses must be fp32")
    chosen, count = maps.selection, maps.num_blocks
    shape = (len(chosen.steps), len(chosen.layers), len(chosen.heads), count)
    wanted = {
        "masks": (*shape, -(-count // 8)),
        "scores": (*shape, count) if chosen.has_scores else (0,),
        "true_mass": tuple(maps.density.shape),
        "best_mass": tuple(maps.density.shape),
    }
    for name, expected in wanted.items():
        if tuple(getattr(maps, name).shape) != expected:
            raise ValueError(f"{name} is {list(getattr(maps, name).shape)}, not {list(expected)}")
    for indices, size in zip(
        (chosen.steps, chosen.layers, chosen.heads), maps.density.shape, strict=True
    ):
        if any(not 0 <= index < size for index in indices):
            raise ValueError("its selection is outside its run")
