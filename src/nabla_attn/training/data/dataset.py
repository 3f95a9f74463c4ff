"""What `nabla encode` wrote, as a dataset."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from nabla_attn.files import is_whole
from nabla_attn.training.data import encoded

Item = dict[str, Any]


class EncodedSet(Dataset[Item]):
    """The videos of a folder that `nabla encode` wrote.

    An item is {"latents": float32 in the transformer's layout without batch, "conditions": tensors
    by argument of the transformer, "empty": those of the empty caption, "caption": text}.

    Args:
        folder: The folder.
        pipeline: The family that it must have been encoded for; empty takes any.

    Attributes:
        grids: Shape of every item's latents.
        captions: Caption of every item.

    Raises:
        ValueError: The folder is missing, empty, unfinished, broken, or of another family.
    """

    def __init__(self, folder: str | Path, pipeline: str = "") -> None:
        self.folder = Path(folder)
        self._entries = encoded.read_index(self.folder)
        family = encoded.read_family(self.folder)
        if pipeline not in ("", family):
            raise ValueError(
                f"{folder} was encoded for {family}, and the model is a {pipeline}. Encode the "
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
        keys = {name: encoded.tensor_key(entry.place, name) for name in self._by_image}
        path = encoded.shard_path(self.folder, entry.shard)
        found = encoded.load_tensors(path, (str(entry.place), *keys.values()))
        own = {name: found[key].float() for name, key in keys.items()}
        own |= _load(encoded.grid_path(self.folder, entry.size))
        return {
            "latents": found[str(entry.place)].float(),
            "conditions": _load(encoded.caption_path(self.folder, entry.caption)) | own,
            "empty": _load(encoded.caption_path(self.folder, "")) | own,
            "caption": entry.caption,
        }

    def _check(self) -> None:
        """Check that all files are there; their headers are read, their tensors are not."""
        for shard, entries in encoded.by_shard(self._entries):
            path = encoded.shard_path(self.folder, shard)
            names = encoded.tensor_names(path)
            self._by_image |= {key.partition(".")[2] for key in names if "." in key}
            keys = {encoded.tensor_key(e.place, name) for e in entries for name in self._by_image}
            missing = {str(entry.place) for entry in entries} | keys
            missing -= names
            if missing:
                raise ValueError(f"{path} lacks {len(missing)} tensors of the videos in its index.")
        paths = {encoded.caption_path(self.folder, entry.caption) for entry in self._entries}
        paths |= {encoded.grid_path(self.folder, entry.size) for entry in self._entries}
        for path in sorted({*paths, encoded.caption_path(self.folder, "")}):
            if not is_whole(path):
                raise ValueError(f"{path} is missing or empty. Run the same `nabla encode` again.")


@lru_cache(maxsize=256)
def _load(path: Path) -> dict[str, Tensor]:
    return encoded.load_tensors(path)
