"""Batches of a run: the same clips, captions and noise for any number of processes.

The clips of a step are drawn together and then split, so one process that accumulates sees what
several processes see. All that is random about a batch follows from the seed and its number.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from nabla_attn.training.config import TrainConfig
from nabla_attn.training.data.batches import (
    BucketSampler,
    PackSampler,
    collate,
    collate_packed,
)

# Items, share of dropped captions, what draws them -> a batch.
Gather = Callable[[Sequence[Any], float, random.Random], dict[str, Any]]


class BatchLoader:
    """Training and validation batches of one process.

    Args:
        dataset: Encoded clips, with `grids`: the shape of each one's latents.
        config: Batch, accumulation, seed, held-out clips.
        replica: Share of a step that this process takes, counted from 0.
        replicas: Number of shares; processes that share a sequence take the same one.

    Raises:
        ValueError: Fewer clips than shares, or none left to train on.
    """

    def __init__(self, dataset: Any, config: TrainConfig, *, replica: int, replicas: int) -> None:
        self.dataset = dataset
        self.config = config
        self.replica, self.replicas = replica, replicas
        self.held_out = hold_out(len(dataset), config.data.validation)
        self.trained_on = sorted(set(range(len(dataset))) - set(self.held_out))
        if replicas > len(self.trained_on):
            raise ValueError(
                f"more processes than clips: {replicas} for {len(self.trained_on)} to train on. "
                "Start fewer processes or encode more videos."
            )
        whole = config.data.batch * config.accumulation * replicas
        shapes = [tuple(dataset.grids[index]) for index in self.trained_on]
        self.sampler = BucketSampler(shapes, whole, config.seed)
        if config.data.pack:
            self.sampler = PackSampler(shapes, config.data.pack, whole, config.seed)
        self._batches: Iterator[list[int]] = iter(())

    def step(self, number: int) -> Iterator[tuple[dict[str, Any], torch.Generator]]:
        """The batches of an optimiser step, each with the generator of its noise.

        Args:
            number: Number of the step, which seeds the noise; the sampler chooses the clips.
        """
        size = self.config.data.batch
        indices = self._next_indices()
        for turn in range(self.config.accumulation):
            share = turn * self.replicas + self.replica
            seed = f"{self.config.seed} {number} {share}"
            places: list[Any] = indices[share * size : (share + 1) * size]
            if self.config.data.pack:
                places = places[0]
            clips = [self.trained_on[place] for place in places]
            gather = collate_packed if self.config.data.pack else collate
            yield self._batch(clips, seed, self.config.data.drop, gather)

    def validation(self) -> Iterator[tuple[dict[str, Any], torch.Generator, float]]:
        """This process's held-out clips one by one, with fixed noise and their weight.

        All processes get equally many; clips that pad a share have weight 0.
        """
        for first in range(0, len(self.held_out), self.replicas):
            place = first + self.replica
            is_real = place < len(self.held_out)
            index = self.held_out[place if is_real else first]
            batch, generator = self._batch([index], f"{self.config.seed} held out {index}", 0.0)
            yield batch, generator, float(is_real)

    def largest(self) -> tuple[dict[str, Any], torch.Generator]:
        """A batch of the largest grid."""
        if isinstance(self.sampler, PackSampler):
            packed = [self.trained_on[place] for place in self.sampler.largest()]
            return self._batch(packed, f"{self.config.seed} largest", 0.0, collate_packed)
        shape = self.shapes()[-1]
        places = [i for i in self.trained_on if tuple(self.dataset.grids[i]) == shape]
        size = self.config.data.batch
        indices = [places[turn % len(places)] for turn in range(size)]
        return self._batch(indices, f"{self.config.seed} largest", 0.0)

    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the latents that are trained on, each once, largest last."""
        shapes = {tuple(self.dataset.grids[index]) for index in self.trained_on}
        return sorted(shapes, key=lambda shape: torch.Size(shape).numel())

    def state_dict(self) -> dict[str, Any]:
        """The sampler's position."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position.

        Raises:
            ValueError: It belongs to other data or another batch size.
        """
        self.sampler.load_state_dict(state)
        self._batches = iter(())

    def _next_indices(self) -> list[int]:
        found = next(self._batches, None)
        while found is None:
            self._batches = iter(self.sampler)
            found = next(self._batches, None)
        return found

    def _batch(
        self, clips: Sequence[int], seed: str, drop: float, gather: Gather = collate
    ) -> tuple[dict[str, Any], torch.Generator]:
        rng = random.Random(seed)
        items = [self.dataset[clip] for clip in clips]
        batch = gather(items, drop, rng)
        if self.config.objective.is_guided:
            # Every caption dropped.
            batch["empty"] = gather(items, 1.0, random.Random(seed))["conditions"]
        return batch, torch.Generator().manual_seed(rng.getrandbits(63))


def hold_out(count: int, wanted: int | None) -> list[int]:
    """Places of the clips that are held out for validation, spread evenly.

    Args:
        count: Number of clips.
        wanted: Number of clips to hold out; None takes a tenth, at least 1 and at most 8, and none
            of a single clip.

    Raises:
        ValueError: Nothing would be left to train on.
    """
    if wanted is None:
        wanted = min(max(1, count // 10), 8, count - 1)
    if wanted and wanted >= count:
        raise ValueError(
            f"data.validation holds out {wanted} clips of {count}: none is left to train on. Hold "
            "out fewer."
        )
    return [place * count // wanted for place in range(wanted)]


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch on a device; numbers of low precision as float32, as the trained weights are."""
    moved: dict[str, Any] = {"latents": _widen(batch["latents"]).to(device)}
    for name in batch.keys() & {"conditions", "empty"}:
        moved[name] = {key: _widen(value).to(device) for key, value in batch[name].items()}
    return moved


def _widen(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
