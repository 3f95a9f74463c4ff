"""Videos in webdataset's tar files: members such as a.mp4 and a.txt (or a.json), never unpacked."""

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from nabla_attn.errors import first_line
from nabla_attn.files import parse_json
from nabla_attn.training.data.clip import (
    MAX_METADATA_BYTES,
    Clip,
    Skipped,
    VideoData,
    clean_caption,
    is_video,
    pick_caption,
    skipped_clip,
)

MAX_VIDEO_BYTES = 2**31
"""Bytes of a video in a tar file: it is read into memory whole."""

MAX_UNPACKED_BYTES = 2**26
MAX_UNPACKED_RATIO = 20
"""What a gzipped tar file may grow to: this many bytes, and this many times its size."""

_DAMAGE = (OSError, tarfile.TarError, EOFError, ValueError)


class TarSource:
    """The videos of tar files, each with the caption among the members next to it.

    Members are those of one sample while their names agree up to the first dot, as webdataset has
    it. In a sample with several videos, each takes the caption of its own full name, and otherwise
    one that is not named after another video. What is damaged costs the videos behind it in the
    same tar file, and counts as one that is skipped.

    Args:
        paths: The tar files, plain or gzipped.

    Raises:
        ValueError: There are no tar files, or none of them has a video.
    """

    def __init__(self, paths: list[Path]) -> None:
        if not paths:
            raise ValueError("there are no tar files to read.")
        self._paths = sorted(paths)
        self._samples = [sample for path in self._paths for sample in _list_samples(path)]
        if all(sample.problem for sample in self._samples):
            problems = [sample.problem for sample in self._samples]
            raise ValueError(
                f"{self._paths[0]}{' and others' * (len(paths) > 1)}: no videos. Members such as "
                "a.mp4 with a.txt or a.json are expected"
                + (f"; {problems[0]}." if problems else ".")
            )

    def __len__(self) -> int:
        """Number of videos."""
        return len(self._samples)

    def identity(self) -> str:
        """Digest of the tar files' names and sizes, and of the members taken."""
        files = [(path.name, path.stat().st_size) for path in self._paths]
        names = [sample.name for sample in self._samples]
        return hashlib.sha256(json.dumps([files, names]).encode()).hexdigest()

    def read(self, start: int, stop: int) -> Iterator[Clip]:
        """The clips from start to stop; tar files without any of them are not opened."""
        for path, samples in groupby(self._samples[start:stop], key=lambda sample: sample.path):
            try:
                stream = _open_tar(path)
            except OSError as error:
                yield from [_refuse(sample, first_line(error)) for sample in samples]
                continue
            with stream:
                yield from (_to_clip(sample, stream) for sample in samples)


@dataclass(frozen=True)
class _Member:
    """A file in a tar file."""

    name: str
    start: int
    size: int


@dataclass(frozen=True)
class _Sample:
    """A video of a tar file with the captions beside it, or what is wrong in its place."""

    path: Path
    name: str
    video: _Member | None = None
    captions: tuple[_Member, ...] = ()
    problem: str = ""


class _Bounded(io.BufferedIOBase):
    """A gzipped file that ends in an error where it grows beyond all measure."""

    def __init__(self, path: Path) -> None:
        self._file = gzip.open(path)  # noqa: SIM115 - closed in close()
        self._most = max(MAX_UNPACKED_BYTES, MAX_UNPACKED_RATIO * path.stat().st_size)

    def read(self, size: int | None = -1, /) -> bytes:
        """Read, at most up to the limit."""
        left = self._most - self._file.tell()
        data = self._file.read(left + 1 if size is None or size < 0 else min(size, left + 1))
        if len(data) > left:
            raise OSError(f"it unpacks to more than {self._most} bytes")
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move to a place in the unpacked file."""
        if whence != io.SEEK_SET or offset > self._most:
            raise OSError(f"it unpacks to more than {self._most} bytes")
        return self._file.seek(offset)

    def tell(self) -> int:
        """The place in the unpacked file."""
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def _open_tar(path: Path) -> BinaryIO:
    with path.open("rb") as file:
        is_gzipped = file.read(2) == b"\x1f\x8b"
    return cast(BinaryIO, _Bounded(path)) if is_gzipped else path.open("rb")


def _list_samples(path: Path) -> list[_Sample]:
    """The videos of a tar file, from its headers alone; damaged places count as one."""
    members: list[tarfile.TarInfo] = []
    problem = ""
    try:
        # Also behind zeros and broken headers, where tarfile would see the end of the file.
        with (
            _open_tar(path) as stream,
            tarfile.open(fileobj=stream, mode="r:", ignore_zeros=True) as file,
        ):
            for member in file:
                members.append(member)
            problem = _find_damage(stream, members)
    except _DAMAGE as error:
        problem = first_line(error)
    samples = [
        sample
        for _, group in groupby(members, key=lambda member: _sample_key(member.name))
        for sample in _to_samples(path, list(group))
    ]
    if problem:
        problem = f"not a whole tar file ({problem})"
        samples.append(_Sample(path, f"{path.name}, damaged", problem=problem))
    return samples


def _find_damage(stream: BinaryIO, members: list[tarfile.TarInfo]) -> str:
    """The first place between members, or behind the last, that is neither a header nor zeros."""
    end: int | None = 0
    for member in [*members, None]:
        if end is not None and (member is None or member.offset != end):
            stream.seek(end)
            if stream.read(tarfile.BLOCKSIZE).strip(b"\0"):
                return f"no header at byte {end}"
        if member is not None:
            blocks = -(-member.size // tarfile.BLOCKSIZE) if member.isreg() else 0
            # What a sparse file takes up is not its size.
            end = None if member.issparse() else member.offset_data + blocks * tarfile.BLOCKSIZE
    return ""


def _sample_key(name: str) -> tuple[str, str]:
    """Folder and name up to the first dot."""
    place = PurePosixPath(name)
    # A name that begins with a dot has its first dot later.
    stem = place.name.lstrip(".")
    return str(place.parent), place.name[: len(place.name) - len(stem)] + stem.partition(".")[0]


def _to_samples(path: Path, members: list[tarfile.TarInfo]) -> Iterator[_Sample]:
    texts = [m for m in members if m.isreg() and m.name.lower().endswith((".txt", ".json"))]
    texts.sort(key=lambda text: text.name.lower().endswith(".json"))
    videos = [m for m in members if not m.isdir() and is_video(m.name)]
    names = [PurePosixPath(video.name).name for video in videos]
    for member in videos:
        name = f"{path.name}/{member.name}"
        captions = _captions_of(member, texts, names)
        problem = ""
        if not member.isreg() or member.issparse():
            problem = "it is a link or a sparse file"
        elif member.size > MAX_VIDEO_BYTES:
            problem = f"{member.size} bytes, at most {MAX_VIDEO_BYTES} are taken"
        yield _Sample(path, name, _place(member), tuple(map(_place, captions)), problem)


def _captions_of(
    video: tarfile.TarInfo, texts: list[tarfile.TarInfo], names: list[str]
) -> list[tarfile.TarInfo]:
    """The captions of a video: a.txt, else a.mp4.txt, else those that are of no other video.

    Args:
        video: The video.
        texts: All captions of its sample.
        names: Names of all videos of its sample.
    """
    name, stems = PurePosixPath(video.name), {PurePosixPath(other).stem for other in names}
    found: dict[str, list[tarfile.TarInfo]] = {}
    for text in texts:
        stem = PurePosixPath(text.name).stem
        owner = stem if stem in stems or stem in names else ""
        found.setdefault(owner, []).append(text)
    by_name = [] if name.name in stems else found.get(name.name, [])
    return found.get(name.stem) or by_name or found.get("", [])


def _place(member: tarfile.TarInfo) -> _Member:
    return _Member(member.name, member.offset_data, member.size)


def _refuse(sample: _Sample, problem: str) -> Clip:
    return skipped_clip(sample.name, Skipped("unreadable", f"{sample.path.name}: {problem}"))


def _to_clip(sample: _Sample, stream: BinaryIO) -> Clip:
    if sample.problem or sample.video is None:
        return _refuse(sample, sample.problem)
    try:
        # In the order of the tar file, which a gzipped one must be read in.
        wanted = sorted((sample.video, *sample.captions), key=lambda member: member.start)
        data = {member: _read_member(stream, member) for member in wanted}
        caption = _read_caption([(each, data[each]) for each in sample.captions])
    except Skipped as reason:
        return skipped_clip(sample.name, reason)
    except _DAMAGE as error:
        return _refuse(sample, first_line(error))
    content = data[sample.video]

    def open_video() -> VideoData:
        return io.BytesIO(content)

    return Clip(sample.name, caption, open_video)


def _read_member(stream: BinaryIO, member: _Member) -> bytes:
    if not is_video(member.name) and member.size > MAX_METADATA_BYTES:
        raise Skipped("caption too long", f"{member.name} has {member.size} bytes")
    stream.seek(member.start)
    data = stream.read(member.size)
    if len(data) < member.size:
        raise EOFError("it ends early")
    return data


def _read_caption(members: list[tuple[_Member, bytes]]) -> str:
    """The caption of the .txt members, or of the .json ones.

    Raises:
        Skipped: There is none, or it cannot be read.
    """
    reason = Skipped("no caption", "neither .txt nor .json beside it")
    for member, data in members:
        try:
            text = data.decode("utf-8-sig")
            if not member.name.lower().endswith(".json"):
                if caption := clean_caption(text):
                    return caption
                reason = Skipped("no caption", f"{member.name} is empty")
                continue
            values = parse_json(text)
            return pick_caption(values if isinstance(values, dict) else {})
        except Skipped as error:
            reason = error
        except ValueError as error:
            reason = Skipped("no caption", f"{member.name}: {first_line(error)}")
    raise reason
