"""A folder of videos with captions: `metadata.jsonl`, `metadata.csv`, or a .txt beside each."""

import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nabla_attn.files import read_ends
from nabla_attn.training.data.clip import (
    CAPTION_NAMES,
    VIDEO_SUFFIXES,
    Clip,
    pick_caption,
    refuse,
)

METADATA = ("metadata.jsonl", "metadata.csv")
# Files keep their tables at one end, so a video that was replaced differs there.
_END_BYTES = 4096


class FolderSource:
    """The videos of a folder.

    `metadata.jsonl` or `metadata.csv` names each by `file_name`, with its caption as `text`,
    `caption` or `prompt`. Without one, every video at any depth has its caption in a .txt file of
    the same name.

    Args:
        folder: the folder.

    Raises:
        ValueError: missing, without videos or captions, or with metadata that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(f"no folder of videos at {folder}.")
        metadata = next((folder / name for name in METADATA if (folder / name).is_file()), None)
        self._folder = folder
        self._clips = _from_metadata(metadata) if metadata else _from_sidecars(folder)

    def __len__(self) -> int:
        """Number of clips."""
        return len(self._clips)

    def identity(self) -> str:
        """Digest of names, captions, and sizes and both ends of the videos."""
        clips = [
            (clip.name, clip.caption, _fingerprint(self._folder / clip.name))
            for clip in self._clips
        ]
        return hashlib.sha256(json.dumps(clips).encode()).hexdigest()

    def read(self, start: int, stop: int) -> Iterator[Clip]:
        """The clips from start to stop."""
        yield from self._clips[start:stop]


def _fingerprint(path: Path) -> str:
    """Size and hash of both ends of a file; empty where there is none to read."""
    try:
        if not path.is_file():
            return ""
        ends = hashlib.sha256(read_ends(path, _END_BYTES)).hexdigest()
        return f"{path.stat().st_size} {ends}"
    except OSError:
        return ""


def _from_sidecars(folder: Path) -> list[Clip]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise ValueError(
            f"{folder} has no videos. It needs files such as {', '.join(VIDEO_SUFFIXES[:4])} with "
            f"{' or '.join(METADATA)} or a .txt of the same name beside each."
        )
    clips = []
    for path in paths:
        name = path.relative_to(folder).as_posix()
        text = path.with_suffix(".txt")
        try:
            caption = " ".join(text.read_text(encoding="utf-8-sig").split())
            blank = refuse("no caption", f"{text.name} is empty")
            footage = (lambda path=path: path) if caption else blank
            clips.append(Clip(name, caption, footage))
        except FileNotFoundError:
            clips.append(Clip(name, "", refuse("no caption", f"{text.name} is missing")))
        except (OSError, UnicodeDecodeError) as error:
            clips.append(Clip(name, "", refuse("no caption", f"{text.name}: {error}")))
    if not any(path.with_suffix(".txt").is_file() for path in paths):
        raise ValueError(
            f"{folder} has {len(paths)} videos and no captions. Add metadata.jsonl with lines such "
            f'as {{"file_name": "{paths[0].name}", "text": "..."}}, or a .txt beside each video.'
        )
    return clips


def _from_metadata(path: Path) -> list[Clip]:
    read = _read_jsonl if path.suffix == ".jsonl" else _read_csv
    clips = []
    found = 0
    for line, row in read(path):
        name = row.get("file_name")
        if not isinstance(name, str) or not name:
            raise ValueError(f"{path}, line {line}: no file_name.")
        video, caption = path.parent / name, pick_caption(row)
        if not video.resolve().is_relative_to(path.parent.resolve()):
            raise ValueError(f"{path}, line {line}: {name} is outside the folder.")
        if not video.is_file():
            clips.append(Clip(name, caption or "", refuse("no video", f"{name} is missing")))
        elif caption is None:
            names = ", ".join(CAPTION_NAMES)
            clips.append(Clip(name, "", refuse("no caption", f"line {line} has none of {names}")))
        else:
            clips.append(Clip(name, caption, lambda video=video: video))  # type: ignore[misc]
        found += video.is_file()
    if not found:
        raise ValueError(
            f"{path} names {len(clips)} videos and none of them is there. Names are relative to "
            f"{path.parent}."
        )
    return clips


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error}).") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected an object, got {line[:60]!r}.")
        yield number, row


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(_read_lines(path), strict=True)
    try:
        if "file_name" not in (reader.fieldnames or ()):
            raise ValueError(f"{path}: no column file_name in {reader.fieldnames}.")
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}.") from error


def _read_lines(path: Path) -> list[str]:
    try:
        # str.splitlines would also split at characters that captions may have, such as U+2028.
        with path.open(encoding="utf-8-sig") as file:
            return file.readlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}.") from error
