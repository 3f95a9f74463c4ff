"""Encoded videos as a dataset, in batches of one size, with captions dropped for guidance."""

import random
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from nabla_attn.training.data import store

Item = dict[str, Any]


class EncodedSet(Dataset[Item]):
    """What `nabla encode` wrote.

    An item is {"latents": float32 in the transformer's layout without batch, "conditions": tensors
    by argument of the transformer, "empty": those of the empty caption, "caption": text}.

    Args:
        folder: of `nabla encode`.
        pipeline: the family that it must have been encoded for; empty takes any.

    Attributes:
        grids: shape of every item's latents.
        captions: of every item.

    Raises:
        ValueError: the folder is missing, empty, unfinished, broken, or of another family.
    """

    def __init__(self, folder: str | Path, pipeline: str = "") -> None:
        self.folder = Path(folder)
        self._entries = store.read_index(self.folder)
        made_for = store.read_family(self.folder)
        if pipeline not in ("", made_for):
            raise ValueError(
                f"{folder} was encoded for {made_for}, and the model is a {pipeline}. Encode the "
                "videos with this model."
            )
        self._by_image: set[str] = set()
        self._check()
        self.grids = [entry.shape for entry in self._entries]
        self.captions = [entry.caption for entry in self._entries]

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Item:
        entry = self._entries[index]
        keys = {name: store.image_key(entry.place, name) for name in self._by_image}
        path = store.shard_path(self.folder, entry.shard)
        found = store.load_tensors(path, (str(entry.place), *keys.values()))
        own = {name: found[key].float() for name, key in keys.items()}
        own |= _load(store.grid_path(self.folder, entry.size))
        return {
            "latents": found[str(entry.place)].float(),
            "conditions": _load(store.caption_path(self.folder, entry.caption)) | own,
            "empty": _load(store.caption_path(self.folder, "")) | own,
            "caption": entry.caption,
        }

    def _check(self) -> None:
        """See that all files are there; their headers are read, their tensors are not."""
        for shard, entries in store.by_shard(self._entries):
            path = store.shard_path(self.folder, shard)
            names = store.tensor_names(path)
            self._by_image |= {key.partition(".")[2] for key in names if "." in key}
            keys = {store.image_key(e.place, name) for e in entries for name in self._by_image}
            missing = {str(entry.place) for entry in entries} | keys
            missing -= names
            if missing:
                raise ValueError(f"{path} lacks {len(missing)} tensors of the videos in its index.")
        paths = {store.caption_path(self.folder, entry.caption) for entry in self._entries}
        paths |= {store.grid_path(self.folder, entry.size) for entry in self._entries}
        for path in sorted({*paths, store.caption_path(self.folder, "")}):
            if not path.is_file():
                raise ValueError(f"{path} is missing. Run the same `nabla encode` again.")


@lru_cache(maxsize=256)
def _load(path: Path) -> dict[str, Tensor]:
    return store.load_tensors(path)


class BucketSampler(Sampler[list[int]]):
    """Batches of indices of one shape, in an order that follows from the seed and the epoch.

    Every sample is in every epoch; what is left of a shape is filled up to a whole batch with
    samples of the same shape. All ranks have the same shape at the same time. Iterating gives the
    rest of the current epoch and then goes on to the next one.

    Args:
        shapes: of every sample.
        batch_size: samples of one rank in a batch.
        seed: of the order.
        rank: this process.
        world_size: number of processes.

    Raises:
        ValueError: no samples, more ranks than samples, or a number out of range.
    """

    def __init__(
        self,
        shapes: Sequence[Hashable],
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size}.")
        if not shapes:
            raise ValueError("there are no samples to draw from.")
        if world_size > len(shapes):
            raise ValueError(
                f"more ranks than samples: {world_size} processes, {len(shapes)} samples. "
                "Start fewer processes or encode more videos."
            )
        self._buckets: dict[Hashable, list[int]] = defaultdict(list)
        for index, shape in enumerate(shapes):
            self._buckets[shape].append(index)
        self._batch_size, self._seed = batch_size, seed
        self._rank, self._world_size = rank, world_size
        self._num_samples = len(shapes)
        self.epoch, self.position = 0, 0

    def __len__(self) -> int:
        """Batches of this rank in an epoch."""
        whole = self._batch_size * self._world_size
        return sum(-(-len(bucket) // whole) for bucket in self._buckets.values())

    def __iter__(self) -> Iterator[list[int]]:
        batches = self._batches(self.epoch)
        for batch in batches[self.position :]:
            # Before the batch is used: a state saved after its step counts it as done.
            self.position += 1
            yield batch
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """Where it stands: the batches handed out so far are done.

        A loader with workers asks ahead of the training: count its batches and set `position`.
        """
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self._seed,
            "num_samples": self._num_samples,
            "batch_size": self._batch_size,
            "world_size": self._world_size,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a state.

        Raises:
            ValueError: it is of other data, or of another seed, batch size or number of ranks.
        """
        mine = self.state_dict()
        for name in ("seed", "num_samples", "batch_size", "world_size"):
            if state[name] != mine[name]:
                raise ValueError(
                    f"the order of samples cannot go on: {name} was {state[name]}, "
                    f"now it is {mine[name]}."
                )
        self.epoch, self.position = state["epoch"], state["position"]

    def _batches(self, epoch: int) -> list[list[int]]:
        rng = random.Random(f"{self._seed} epoch {epoch}")
        whole = self._batch_size * self._world_size
        start = self._rank * self._batch_size
        batches = []
        for bucket in self._buckets.values():
            order = rng.sample(bucket, len(bucket))
            order += [order[index % len(bucket)] for index in range(-len(bucket) % whole)]
            for first in range(start, len(order), whole):
                batches.append(order[first : first + self._batch_size])
        rng.shuffle(batches)
        return batches


def collate(items: Sequence[Item], drop: float, rng: random.Random) -> dict[str, Any]:
    """Stack items of one shape to a batch.

    Args:
        items: of `EncodedSet` or `WorldSet`.
        drop: share of captions replaced by the empty one, for classifier-free guidance.
        rng: draws which; one number per item.

    Returns:
        {"latents": [batch, ...], "conditions": dict of [batch, ...]}.

    Raises:
        ValueError: shapes differ, such as those of texts that a pipeline does not pad.
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
