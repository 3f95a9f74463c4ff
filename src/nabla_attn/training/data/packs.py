"""Clips of different length, packed into sequences of at most so many latent frames."""

import random
from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from nabla_attn.training.data.dataset import BucketSampler, Item
from nabla_attn.training.family import SEGMENTS, TEXTS


class PackSampler(BucketSampler):
    """Like `BucketSampler`, with packs of clips of one height and width in place of samples.

    Which clips share a pack changes with the epoch.

    Args:
        shapes: of every sample, [channels, frames, height, width].
        frames: latent frames of a pack at most.
        packs: packs in a batch.
        seed: of the order.

    Raises:
        ValueError: no samples, or a clip longer than a pack.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], frames: int, packs: int, seed: int = 0
    ) -> None:
        super().__init__([(shape[0], *shape[2:]) for shape in shapes], packs, seed)
        self._frames = frames
        self._lengths = [shape[1] for shape in shapes]
        self._latents = [prod(shape) for shape in shapes]
        if max(self._lengths) > frames:
            raise ValueError(
                f"a clip of {max(self._lengths)} latent frames does not fit data.pack={frames}."
            )

    def __len__(self) -> int:
        """Batches of the current epoch."""
        return len(self._batches(self.epoch))

    def largest(self) -> list[int]:
        """The pack of the first epoch with the most latents."""
        packs = [pack for batch in self._batches(0) for pack in batch]
        return max(packs, key=lambda pack: sum(self._latents[index] for index in pack))

    def _batches(self, epoch: int) -> list[list[Any]]:
        rng = random.Random(f"{self._seed} epoch {epoch}")
        batches = []
        for bucket in self._buckets.values():
            packs = self._pack(rng.sample(bucket, len(bucket)))
            packs += [packs[i % len(packs)] for i in range(-len(packs) % self._batch_size)]
            for first in range(0, len(packs), self._batch_size):
                batches.append(packs[first : first + self._batch_size])
        rng.shuffle(batches)
        return batches

    def _pack(self, order: list[int]) -> list[list[int]]:
        """First fit: every clip goes to the first pack that has room."""
        packs: list[list[int]] = []
        room: list[int] = []
        for index in order:
            length = self._lengths[index]
            place = next((i for i, free in enumerate(room) if free >= length), len(packs))
            if place == len(packs):
                packs.append([])
                room.append(self._frames)
            packs[place].append(index)
            room[place] -= length
        return packs


def pack(items: Sequence[Item], drop: float, rng: random.Random) -> dict[str, Any]:
    """Put clips into one sequence, as a batch of 1.

    Args:
        items: of one height and width.
        drop: share of captions replaced by the empty one.
        rng: draws which; one number per item.

    Returns:
        As `collate`: clips along frames, conditions along their first axis, and how long each is.
    """
    chosen = [item["empty" if rng.random() < drop else "conditions"] for item in items]
    conditions = {name: torch.cat([entry[name] for entry in chosen])[None] for name in chosen[0]}
    first = next(iter(chosen[0]))
    conditions[SEGMENTS] = torch.tensor([[item["latents"].shape[1] for item in items]])
    conditions[TEXTS] = torch.tensor([[len(entry[first]) for entry in chosen]])
    return {
        "latents": torch.cat([item["latents"] for item in items], dim=1)[None],
        "conditions": conditions,
    }
