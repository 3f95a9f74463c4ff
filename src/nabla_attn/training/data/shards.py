"""Videos in webdataset shards: tar files with members such as a.mp4 and a.txt (or a.json)."""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from nabla_attn.training.data.clip import CAPTION_NAMES, VIDEO_SUFFIXES, Clip, pick_caption, refuse

_VIDEOS = tuple(suffix[1:] for suffix in VIDEO_SUFFIXES)


class ShardSource:
    """The samples of tar files, read one after the other and never unpacked.

    Args:
        paths: the tar files.

    Raises:
        ValueError: webdataset is not installed; no tar files, one that cannot be read, or none
            with a video.
    """

    def __init__(self, paths: list[Path]) -> None:
        try:
            import webdataset  # noqa: F401
        except ImportError as error:
            raise ValueError(
                "tar files are read by webdataset: pip install nabla-attn[train]"
            ) from error
        if not paths:
            raise ValueError("there are no tar files to read.")
        self._paths = sorted(paths)
        self._counts = [_count_samples(path) for path in self._paths]
        if not sum(self._counts):
            raise ValueError(
                f"{self._paths[0]}{' and others' * (len(paths) > 1)}: no videos. Members such as "
                "a.mp4 with a.txt or a.json are expected."
            )

    def __len__(self) -> int:
        """Number of samples with a video."""
        return sum(self._counts)

    def identity(self) -> str:
        """Digest of the tar files' names, sizes and counts."""
        files = [
            (path.name, path.stat().st_size, count)
            for path, count in zip(self._paths, self._counts, strict=True)
        ]
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()

    def read(self, start: int, stop: int) -> Iterator[Clip]:
        """The samples from start to stop; tar files without any of them are not opened."""
        first = 0
        for path, count in zip(self._paths, self._counts, strict=True):
            low, high = max(start - first, 0), min(stop - first, count)
            if low < high:
                yield from _read_whole(path, low, high)
            first += count


def _read_whole(path: Path, low: int, high: int) -> Iterator[Clip]:
    """The samples from low to high; those after a damaged place are refused."""
    done = low
    problem = "it ended early"
    try:
        for clip in islice(_read_tar(path), low, high):
            yield clip
            done += 1
    except (OSError, tarfile.TarError, EOFError, ValueError) as error:
        problem = str(error).splitlines()[0]
    for index in range(done, high):
        yield Clip(f"{path.name}/{index}", "", refuse("unreadable", f"{path.name}: {problem}"))


def _count_samples(path: Path) -> int:
    """Samples with a video, from the headers alone."""
    from webdataset.tariterators import base_plus_ext

    try:
        with tarfile.open(path) as file:
            names = [base_plus_ext(member.name) for member in file if member.isreg()]
    except (OSError, tarfile.TarError, EOFError) as error:
        raise ValueError(f"cannot read {path}: not a whole tar file ({error}).") from error
    named = ((key, suffix) for key, suffix in names if key is not None)
    groups = groupby(named, key=lambda pair: pair[0])
    return sum(any(end.lower() in _VIDEOS for _, end in group) for _, group in groups)


def _read_tar(path: Path) -> Iterator[Clip]:
    from webdataset.tariterators import group_by_keys, tar_file_expander

    with path.open("rb") as stream:
        for sample in group_by_keys(tar_file_expander([{"url": path.name, "stream": stream}])):
            suffix = next((end for end in _VIDEOS if end in sample), None)
            if suffix is not None:
                yield _to_clip(path, sample, suffix)


def _to_clip(path: Path, sample: dict[str, Any], suffix: str) -> Clip:
    name = f"{path.name}/{sample['__key__']}.{suffix}"
    data = sample[suffix]
    try:
        caption = _caption(sample)
    except (ValueError, RecursionError) as error:
        return Clip(name, "", refuse("no caption", str(error)))
    if caption is None:
        names = ", ".join(CAPTION_NAMES)
        return Clip(name, "", refuse("no caption", f"neither .txt nor {names} in .json"))
    return Clip(name, caption, lambda: io.BytesIO(data))


def _caption(sample: dict[str, Any]) -> str | None:
    if text := " ".join(sample.get("txt", b"").decode("utf-8-sig").split()):
        return text
    values = json.loads(sample["json"]) if "json" in sample else {}
    return pick_caption(values) if isinstance(values, dict) else None
