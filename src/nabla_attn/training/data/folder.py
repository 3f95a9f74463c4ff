"""A folder to encode: videos with their captions, or tar files.

Captions are in `metadata.jsonl`, in `metadata.csv`, or in a .txt file beside each video.
"""

import csv
import hashlib
import json
import os
import unicodedata
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from nabla_attn.files import parse_json, read_ends, read_lines
from nabla_attn.training.data.clip import (
    MAX_METADATA_BYTES,
    VIDEO_SUFFIXES,
    Clip,
    ClipSource,
    Skipped,
    clean_caption,
    is_video,
    pick_caption,
    skipped_clip,
)
from nabla_attn.training.data.tars import TarSource

METADATA = ("metadata.jsonl", "metadata.csv")
# Files keep their tables at one end, so a video that was replaced differs there.
_END_BYTES = 4096

_Form = Literal["NFC", "NFD"]

Found = tuple[Clip, Path | None]
"""A clip, and its file where there is one."""


class FolderSource:
    """The videos of a folder, at any depth; links are followed.

    `metadata.jsonl` or `metadata.csv` names each by `file_name`, with its caption as `text`,
    `caption` or `prompt`. Without one, every video has its caption in a .txt file of the same name.
    A line that is broken and a video that is not named are clips too, and will be skipped.

    Args:
        folder: The folder.

    Raises:
        ValueError: It is missing, or has no video with a caption.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(f"no folder of videos at {folder}.")
        metadata = find_metadata(folder)
        self._found = _from_metadata(metadata) if metadata else _from_sidecars(folder)

    def __len__(self) -> int:
        """Number of clips."""
        return len(self._found)

    def identity(self) -> str:
        """Digest of names, captions, and sizes and both ends of the videos."""
        clips = [(clip.name, clip.caption, _fingerprint(path)) for clip, path in self._found]
        return hashlib.sha256(json.dumps(clips).encode()).hexdigest()

    def read(self, start: int, stop: int) -> Iterator[Clip]:
        """The clips from start to stop."""
        yield from (clip for clip, _ in self._found[start:stop])


def find_metadata(folder: Path) -> Path | None:
    """The file that names the videos of a folder."""
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def list_files(folder: Path) -> tuple[list[Path], list[Clip]]:
    """All files of a folder at any depth, through links too.

    Returns:
        The files, sorted, and a clip to skip for every folder that cannot be read.
    """
    files: list[Path] = []
    unreadable: list[Clip] = []

    def note(error: OSError) -> None:
        name = os.path.relpath(error.filename, folder)
        reason = Skipped("unreadable", f"the folder {name}: {error.strerror}")
        unreadable.append(skipped_clip(name, reason))

    # Folders on the way to each one: a link to one of them would be entered for ever.
    on_the_way = {str(folder): {folder.resolve()}}
    for here, folders, names in os.walk(folder, onerror=note, followlinks=True):
        above, entered = on_the_way.pop(here), []
        for name in sorted(folders):
            real = Path(here, name).resolve()
            if real not in above:
                entered.append(name)
                on_the_way[str(Path(here, name))] = above | {real}
        folders[:] = entered
        files += [Path(here, name) for name in names]
    return sorted(files), unreadable


def _fingerprint(path: Path | None) -> str:
    """Size and hash of both ends of a file; empty where there is none to read."""
    try:
        if path is None or not path.is_file():
            return ""
        ends = hashlib.sha256(read_ends(path, _END_BYTES)).hexdigest()
        return f"{path.stat().st_size} {ends}"
    except OSError:
        return ""


def _from_sidecars(folder: Path) -> list[Found]:
    files, unreadable = list_files(folder)
    videos = [path for path in files if is_video(path.name)]
    if not videos:
        raise ValueError(
            f"{folder} has no videos. It needs files such as {', '.join(VIDEO_SUFFIXES[:4])} with "
            f"{' or '.join(METADATA)} or a .txt of the same name beside each."
        )
    found: list[Found] = [
        _to_clip(path.relative_to(folder).as_posix(), path, _read_sidecar) for path in videos
    ]
    if not any(_find_sidecar(path) for path in videos):
        raise ValueError(
            f"{folder} has {len(videos)} videos and no captions. Add metadata.jsonl with lines "
            f'such as {{"file_name": "{videos[0].name}", "text": "..."}}, or a .txt beside each '
            "video."
        )
    return found + [(clip, None) for clip in unreadable]


def _to_clip(name: str, path: Path, read_caption: Any) -> Found:
    """A clip of a file, or why it will be skipped."""
    try:
        _check_file(path, name)
        return Clip(name, read_caption(path), lambda: path), path
    except Skipped as reason:
        return skipped_clip(name, reason), path


def _check_file(path: Path, name: str) -> None:
    # Opening a pipe would wait for ever.
    if not path.exists():
        is_link = path.is_symlink()
        what = "is a link to a file that is missing" if is_link else "is missing"
        raise Skipped("no video", f"{name} {what}")
    if not path.is_file():
        raise Skipped("no video", f"{name} is not a file")


def _find_sidecar(video: Path) -> Path | None:
    """The .txt beside a video: a.txt, or a.mp4.txt where that is not the one of a.mp4.mp4."""
    names = [video.with_suffix(".txt").name]
    if not any(os.path.lexists(f"{video}{suffix}") for suffix in VIDEO_SUFFIXES):
        names.append(f"{video.name}.txt")
    forms = _free_forms(video.name, lambda name: os.path.lexists(video.with_name(name)))
    found = (_find_file(video.parent, name, forms) for name in names)
    return next((path for path in found if path is not None and path.is_file()), None)


def _read_sidecar(video: Path) -> str:
    path = _find_sidecar(video)
    if path is None:
        raise Skipped("no caption", f"{video.with_suffix('.txt').name} is missing")
    try:
        if path.stat().st_size > MAX_METADATA_BYTES:
            raise Skipped("caption too long", f"{path.name} has {path.stat().st_size} bytes")
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Skipped("no caption", f"{path.name} is not UTF-8") from error
    except OSError as error:
        raise Skipped("no caption", f"{path.name}: {error.strerror}") from error
    caption = clean_caption(text)
    if not caption:
        raise Skipped("no caption", f"{path.name} is empty")
    return caption


def _free_forms(name: str, is_taken: Callable[[str], bool]) -> list[_Form]:
    """Unicode's forms in which a name is not the name of something else."""
    forms = ((form, unicodedata.normalize(form, name)) for form in get_args(_Form))
    return [form for form, other in forms if other == name or not is_taken(other)]


def _find_file(folder: Path, name: str, forms: list[_Form]) -> Path | None:
    """A file by name, or by its name in one of some forms of Unicode."""
    names = (name, *(unicodedata.normalize(form, name) for form in forms))
    for path in (folder / each for each in names):
        try:
            if path.exists() or path.is_symlink():
                return path
        except OSError:  # too long a name
            return None
    return None


def _from_metadata(path: Path) -> list[Found]:
    rows = list(_read_jsonl(path) if path.suffix == ".jsonl" else _read_csv(path))
    named = {row.get("file_name") for _, row in rows if isinstance(row, dict)}
    found = [_to_named_clip(path, line, row, named) for line, row in rows]
    videos = {os.path.normpath(video) for _, video in found if video is not None}
    if not videos:
        raise ValueError(_explain_nothing(path, [clip for clip, _ in found]))
    files, unreadable = list_files(path.parent)
    for file in files:
        if is_video(file.name) and str(file) not in videos:
            reason = Skipped("no caption", f"it is not named in {path.name}")
            found.append((skipped_clip(file.relative_to(path.parent).as_posix(), reason), None))
    return found + [(clip, None) for clip in unreadable]


def _to_named_clip(
    path: Path, line: int, row: dict[str, Any] | Skipped, named: Container[Any]
) -> Found:
    """A clip that a line of metadata names; its file only where it is there."""
    if isinstance(row, Skipped):
        return skipped_clip(f"{path.name}, line {line}", row), None
    name = row.get("file_name")
    if not isinstance(name, str) or not name:
        reason = Skipped("broken line", f"line {line}: no file_name")
        return skipped_clip(f"{path.name}, line {line}", reason), None
    # Its text decides: the file itself may be a link to anywhere, as the hub's cache has them.
    plain = os.path.normpath(name)
    if Path(plain).is_absolute() or Path(plain).parts[:1] == (os.pardir,):
        return skipped_clip(name, Skipped("outside the folder", f"line {line}: {name}")), None
    video = _find_file(path.parent, plain, _free_forms(plain, named.__contains__))
    if video is None:
        return skipped_clip(name, Skipped("no video", f"{name} is missing")), None

    def read_caption(_: Path) -> str:
        try:
            return pick_caption(row)
        except Skipped as reason:
            raise Skipped(reason.kind, f"line {line}: {reason.detail}") from reason

    return _to_clip(name, video, read_caption)


def _explain_nothing(path: Path, clips: list[Clip]) -> str:
    """Why metadata gives no video."""
    reasons: list[str] = []
    for clip in clips:
        try:
            clip.open()
        except Skipped as reason:
            if reason.kind != "no video":
                reasons.append(str(reason))
    if reasons:
        return f"{path} names no video that is there; the first of its problems: {reasons[0]}."
    return (
        f"{path} names {len(clips)} videos and none of them is there. Names are relative to "
        f"{path.parent}."
    )


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any] | Skipped]]:
    for number, line in read_lines(path, MAX_METADATA_BYTES):
        if isinstance(line, ValueError):
            yield number, Skipped("broken line", f"line {number}: {line}")
        elif line.strip():
            yield number, _read_object(number, line)


def _read_object(number: int, line: str) -> dict[str, Any] | Skipped:
    try:
        row = parse_json(line)
    except ValueError as error:
        return Skipped("broken line", f"line {number}: not valid JSON ({error})")
    if not isinstance(row, dict):
        return Skipped("broken line", f"line {number}: expected an object, got {line[:60]!r}")
    return row


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any] | Skipped]]:
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            lines = file.readlines()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}.") from error
    header: list[str] | None = None
    start = 0
    while start < len(lines):
        # After a broken row the reader starts at the next line: a stray quote costs one line.
        reader = csv.reader((lines[n] for n in range(start, len(lines))), strict=True)
        whole = 0
        try:
            for cells in reader:
                whole = reader.line_num
                if header is None:
                    header = cells
                    if "file_name" not in header:
                        break
                elif cells:
                    yield start + whole, _read_row(start + whole, header, cells)
            break
        except csv.Error as error:
            start += whole + 1
            yield start, Skipped("broken line", f"line {start}: {error}")
    if "file_name" not in (header or ()):
        raise ValueError(f"{path}: no column file_name in {header}.")


def _read_row(line: int, header: list[str], cells: list[str]) -> dict[str, Any] | Skipped:
    if len(cells) > len(header):
        detail = f"{len(cells)} cells for {len(header)} columns; quote texts with commas"
        return Skipped("broken line", f"line {line}: {detail}")
    if any("\udc80" <= letter <= "\udcff" for cell in cells for letter in cell):
        return Skipped("broken line", f"line {line}: not UTF-8")
    return dict(zip(header, cells, strict=False))


def open_source(paths: Sequence[Path]) -> ClipSource:
    """The clips of a folder of videos, of tar files, or of a folder of tar files.

    Raises:
        ValueError: A path is missing or of another kind, a folder holds both videos and tar files,
            or there is no video.
    """
    for path in paths:
        if not path.exists():
            raise ValueError(f"no videos at {path}: there is no such file or folder.")
    if len(paths) == 1 and paths[0].is_dir():
        return _open_folder(paths[0])
    for path in paths:
        if not _is_tar(path):
            raise ValueError(f"{path} is not a .tar file. Pass one folder, or .tar files.")
    return TarSource(list(paths))


def _open_folder(folder: Path) -> ClipSource:
    if find_metadata(folder):
        return FolderSource(folder)
    files, _ = list_files(folder)
    tars = [path for path in files if _is_tar(path)]
    if not tars:
        return FolderSource(folder)
    videos = [path for path in files if is_video(path.name)]
    if videos:
        raise ValueError(
            f"{folder} has tar files and videos beside them, such as {tars[0].name} and "
            f"{videos[0].name}. Encode them one after the other, each from a folder of its own."
        )
    return TarSource(tars)


def _is_tar(path: Path) -> bool:
    return path.name.lower().endswith((".tar", ".tar.gz", ".tgz"))
