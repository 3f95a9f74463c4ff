"""Samples in batches of one shape, or packed into sequences, with captions dropped for guidance."""

import random
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from nabla_attn.training.data.encoded import Item
from nabla_attn.training.families import SEGMENTS, TEXTS


class BucketSampler(Sampler[list[int]]):
    """Batches of indices of one shape, in an order that follows from the seed and the epoch.

    Every sample is in every epoch; what is left of a shape is filled up to a whole batch with
    samples of the same shape. All processes have the same shape at the same time. Iterating gives
    the rest of the current epoch, and the next time all of the next one.

    Args:
        shapes: Shape of every sample.
        batch_size: Number of samples of one process in a batch.
        seed: Seed of the order.
        process_index: Number of this process, from 0.
        num_processes: Number of processes that share the samples.

    Raises:
        ValueError: There are no samples, more processes than samples, or a number is out of range.
    """

    def __init__(
        self,
        shapes: Sequence[Hashable],
        batch_size: int,
        seed: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if not 0 <= process_index < num_processes:
            raise ValueError(f"process_index {process_index} is not one of {num_processes}.")
        if not shapes:
            raise ValueError("there are no samples to draw from.")
        if num_processes > len(shapes):
            raise ValueError(
                f"more processes than samples: {num_processes} for {len(shapes)}. "
                "Start fewer processes or encode more videos."
            )
        self._buckets: dict[Hashable, list[int]] = defaultdict(list)
        for index, shape in enumerate(shapes):
            self._buckets[shape].append(index)
        self._batch_size, self._seed = batch_size, seed
        self._process_index, self._num_processes = process_index, num_processes
        self._num_samples = len(shapes)
        self.epoch, self.position = 0, 0

    def __len__(self) -> int:
        """Number of batches of this process in an epoch."""
        whole = self._batch_size * self._num_processes
        return sum(-(-len(bucket) // whole) for bucket in self._buckets.values())

    def __iter__(self) -> Iterator[list[int]]:
        batches = self._batches(self.epoch)
        for batch in batches[self.position :]:
            # Before the batch is used: a state saved after its step counts it as done.
            self.position += 1
            yield batch
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """The position in the order: the batches handed out so far are done.

        A loader with workers asks ahead of the training: count its batches and set `position`.
        """
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self._seed,
            "num_samples": self._num_samples,
            "batch_size": self._batch_size,
            "num_processes": self._num_processes,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a state.

        Raises:
            ValueError: The data, seed, batch size or number of processes are others.
        """
        mine = self.state_dict()
        for name in ("seed", "num_samples", "batch_size", "num_processes"):
            # Checkpoints written before the number of processes had this name lack it.
            if state.get(name, mine[name]) != mine[name]:
                raise ValueError(
                    f"the order of samples cannot be continued: {name} was {state[name]}, "
                    f"now it is {mine[name]}."
                )
        self.epoch, self.position = state["epoch"], state["position"]

    def _batches(self, epoch: int) -> list[list[int]]:
        rng = random.Random(f"{self._seed} epoch {epoch}")
        whole = self._batch_size * self._num_processes
        start = self._process_index * self._batch_size
        batches = []
        for bucket in self._buckets.values():
            order = rng.sample(bucket, len(bucket))
            order += [order[index % len(bucket)] for index in range(-len(bucket) % whole)]
            for first in range(start, len(order), whole):
                batches.append(order[first : first + self._batch_size])
        rng.shuffle(batches)
        return batches


class PackSampler(BucketSampler):
    """Like `BucketSampler`, with packs of clips of one height and width in place of samples.

    Which clips share a pack changes with the epoch.

    Args:
        shapes: Shape of every sample, [channels, frames, height, width].
        frames: The most latent frames of a pack.
        packs: Number of packs in a batch.
        seed: Seed of the order.

    Raises:
        ValueError: There are no samples, or a clip is longer than a pack.
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
        """Number of batches in the current epoch."""
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


def collate(items: Sequence[Item], drop: float, rng: random.Random) -> dict[str, Any]:
    """Stack items of one shape into a batch.

    Args:
        items: Items of `EncodedSet` or `WorldSet`.
        drop: Share of captions replaced by the empty one, for classifier-free guidance.
        rng: Draws which; one number per item.

    Returns:
        {"latents": [batch, ...], "conditions": dict of [batch, ...]}.

    Raises:
        ValueError: Shapes differ, such as those of texts that a pipeline does not pad.
    """
    chosen = [item["empty" if rng.random() < drop else "conditions"] for item in items]
    return {
        "latents": _stack("latents", [item["latents"] for item in items]),
        "conditions": {
            name: _stack(name, [conditions[name] for conditions in chosen]) for name in chosen[0]
        },
    }


def _stack(name: str, tensors: list[Tensor]) -> Tensor:
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1:
        raise ValueError(
            f"{name} of one batch differ in shape: {sorted(shapes)}. This model's texts are not "
            "padded; train it with a batch size of 1 and accumulate gradients."
        )
    return torch.stack(tensors)


def collate_packed(items: Sequence[Item], drop: float, rng: random.Random) -> dict[str, Any]:
    """Put clips into one sequence, as a batch of 1.

    Args:
        items: Items of one height and width.
        drop: Share of captions replaced by the empty one.
        rng: Draws which; one number per item.

    Returns:
        A batch like that of `collate`: clips along frames, conditions along their first axis, and
        how long each is.
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
