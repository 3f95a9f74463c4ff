"""The files of a folder of encoded videos, and the dataset that reads them.

encoding.json                 what was asked for, so that a run continues with the same
shard-00000.safetensors       latents by number, and conditions by first frame as number.name
shard-00000.json              their names and captions, and what was skipped; written last
captions/ab/ab12....safetensors   conditions of one caption, whoever shows it
grids/5x64x96.safetensors     conditions that follow from the size
index.json, skipped.jsonl     all shards together; written when they are done
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from nabla_attn.errors import first_line
from nabla_attn.files import is_whole, read_json, read_object, whole_file, write_text

INDEX, SKIPPED, ENCODING = "index.json", "skipped.jsonl", "encoding.json"


@dataclass(frozen=True)
class EncodedVideo:
    """One encoded video.

    Attributes:
        name: Its name in its source.
        caption: What it shows.
        shard: Number of its shard.
        place: Its number in the shard.
        shape: Shape of its latents, in the transformer's layout without batch.
        size: (frames, height, width) of the video in pixels.
    """

    name: str
    caption: str
    shard: int
    place: int
    shape: tuple[int, ...]
    size: tuple[int, int, int]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "EncodedVideo":
        """Read an entry of the index."""
        shape = tuple(int(n) for n in values["shape"])
        frames, height, width = (int(n) for n in values["size"])
        name, caption = str(values["name"]), str(values["caption"])
        place = int(values["shard"]), int(values["place"])
        if min(place) < 0 or min(*shape, frames, height, width) < 1:
            raise ValueError(f"the places and sizes of {name} must be positive")
        return cls(name, caption, *place, shape, (frames, height, width))


def shard_path(folder: Path, shard: int) -> Path:
    """Latents of a shard; its list stands beside it as .json."""
    return folder / f"shard-{shard:05d}.safetensors"


def caption_path(folder: Path, caption: str) -> Path:
    """Conditions of a caption."""
    digest = hashlib.sha256(caption.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return folder / "captions" / digest[:2] / f"{digest}.safetensors"


def grid_path(folder: Path, size: tuple[int, int, int]) -> Path:
    """Conditions that follow from a size in (frames, height, width)."""
    return folder / "grids" / f"{'x'.join(map(str, size))}.safetensors"


def tensor_key(place: int, condition: str = "") -> str:
    """Name in a shard of a video's latents, or of a condition that follows from its first frame."""
    return f"{place}.{condition}" if condition else str(place)


def save_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata)


def load_tensors(path: Path, names: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Tensors of a file, all or those named.

    Raises:
        ValueError: The file is missing or damaged; it is named.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in names or file.keys()}


def tensor_names(path: Path) -> set[str]:
    """Names in a safetensors file, read from its header.

    Raises:
        ValueError: The file is missing or damaged; it is named.
    """
    with _opened(path) as file:
        return set(file.keys())


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file notes beside its tensors.

    Raises:
        ValueError: The file is missing or damaged; it is named.
    """
    with _opened(path) as file:
        return dict(file.metadata() or {})


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path}: missing or damaged ({first_line(error)}). Remove it and its .json and run "
            "the same `nabla encode` again."
        ) from error


def write_json(path: Path, values: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(values, ensure_ascii=False) + "\n")


def to_lines(values: list[Any]) -> str:
    """One JSON text a line."""
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def read_shard(folder: Path, name: str) -> dict[str, Any]:
    """The list of a shard: "videos", "skipped" with the kind of each, and "num_cut".

    Raises:
        ValueError: It is missing or damaged; it is named.
    """
    path = folder / f"{name}.json"
    values = read_object(path)
    lists = [values.get(key) for key in ("videos", "skipped")]
    are_lists = all(
        isinstance(each, list) and all(isinstance(line, dict) for line in each) for each in lists
    )
    has_kinds = are_lists and all(isinstance(line.get("kind"), str) for line in values["skipped"])
    if not has_kinds or type(values.get("num_cut", 0)) is not int:
        raise ValueError(
            f"{path}: damaged. Remove it and its .safetensors and run the same `nabla encode` "
            "again."
        )
    return values


def read_index(folder: Path) -> list[EncodedVideo]:
    """All encoded videos of a finished folder.

    Raises:
        ValueError: It is no such folder, it is unfinished or empty, or its index is broken.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder of encoded videos at {folder}. Make it with `nabla encode`.")
    if not is_whole(folder / INDEX):
        if (folder / ENCODING).is_file():
            done = len(list(folder.glob("shard-*.json")))
            raise ValueError(
                f"{folder} is not finished: {done} shards are done. Run the same `nabla encode` "
                "again; it continues."
            )
        raise ValueError(f"{folder} holds no encoded videos. Make them with `nabla encode`.")
    values = read_json(folder / INDEX)
    try:
        entries = [EncodedVideo.from_dict(entry) for entry in values["videos"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / INDEX}: not an index of encoded videos.") from error
    if not entries:
        raise ValueError(
            f"{folder}: every video was skipped. {folder / SKIPPED} says why, one per line."
        )
    return entries


def read_family(folder: Path) -> str:
    """The pipeline class that a folder was encoded for.

    Raises:
        ValueError: The folder does not name one.
    """
    values = read_object(folder / ENCODING)
    if not isinstance(values.get("pipeline"), str):
        raise ValueError(f"{folder / ENCODING}: it does not name a pipeline.")
    return str(values["pipeline"])


def by_shard(entries: list[EncodedVideo]) -> Iterator[tuple[int, list[EncodedVideo]]]:
    """Videos of each shard, in order."""
    for shard in sorted({entry.shard for entry in entries}):
        yield shard, [entry for entry in entries if entry.shard == shard]


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
        self._entries = read_index(self.folder)
        family = read_family(self.folder)
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
        keys = {name: tensor_key(entry.place, name) for name in self._by_image}
        path = shard_path(self.folder, entry.shard)
        found = load_tensors(path, (str(entry.place), *keys.values()))
        own = {name: found[key].float() for name, key in keys.items()}
        own |= _load(grid_path(self.folder, entry.size))
        return {
            "latents": found[str(entry.place)].float(),
            "conditions": _load(caption_path(self.folder, entry.caption)) | own,
            "empty": _load(caption_path(self.folder, "")) | own,
            "caption": entry.caption,
        }

    def _check(self) -> None:
        """Check that all files are there; their headers are read, their tensors are not."""
        for shard, entries in by_shard(self._entries):
            path = shard_path(self.folder, shard)
            names = tensor_names(path)
            self._by_image |= {key.partition(".")[2] for key in names if "." in key}
            keys = {tensor_key(e.place, name) for e in entries for name in self._by_image}
            missing = {str(entry.place) for entry in entries} | keys
            missing -= names
            if missing:
                raise ValueError(f"{path} lacks {len(missing)} tensors of the videos in its index.")
        paths = {caption_path(self.folder, entry.caption) for entry in self._entries}
        paths |= {grid_path(self.folder, entry.size) for entry in self._entries}
        for path in sorted({*paths, caption_path(self.folder, "")}):
            if not is_whole(path):
                raise ValueError(f"{path} is missing or empty. Run the same `nabla encode` again.")


@lru_cache(maxsize=256)
def _load(path: Path) -> dict[str, Tensor]:
    return load_tensors(path)
