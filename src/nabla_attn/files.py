"""Files that appear whole or not at all, and how they are told apart."""

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MAX_NAME_BYTES = 200
"""Of a file's name in that of its temporary file; file systems take 255 in all."""


@contextmanager
def whole_file(path: str | Path, *, private: bool = False) -> Iterator[Path]:
    """Yield a temporary name in the folder of ``path``; it becomes ``path`` if the block succeeds.

    An exception, Ctrl-C included, removes the temporary file and leaves an earlier ``path`` alone.

    Args:
        path: the final name. Missing parent folders are made.
        private: only its owner may read it.

    Raises:
        OSError: the folder cannot be made or written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        temporary.touch(mode=0o600 if private else 0o666)
        mode = temporary.stat().st_mode
        yield temporary
        # Some libraries write a new file of theirs, which only its owner may read.
        temporary.chmod(mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    # Processes of several machines or containers share numbers, so chance tells them apart.
    name = os.fsencode(path.name)[:MAX_NAME_BYTES].decode(errors="ignore")
    return path.with_name(f".{name}.{secrets.token_hex(8)}.tmp")


def read_ends(path: Path, count: int) -> bytes:
    """The first and the last ``count`` bytes of a file, where one that was replaced differs."""
    with path.open("rb") as file:
        first = file.read(count)
        file.seek(max(0, path.stat().st_size - count))
        return first + file.read(count)


def fingerprint_files(folder: Path, paths: Iterable[Path]) -> str:
    """Hash of names, sizes, and both ends of files of a folder, in their order.

    Weights that were trained further differ everywhere, so their ends tell; all of them would take
    minutes to read.
    """
    total = hashlib.sha256()
    for path in paths:
        if path.is_file():
            size = path.stat().st_size
            total.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
            total.update(read_ends(path, 65536))
    return total.hexdigest()


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | Path, *, max_bytes: int | None = None) -> Any:
    """What a JSON file holds.

    Args:
        path: the file.
        max_bytes: a larger file is refused; None takes any.

    Raises:
        ValueError: missing, too large or not JSON; the file is named.
    """
    path = Path(path)
    try:
        if max_bytes is not None and path.stat().st_size > max_bytes:
            raise ValueError(f"{path} is larger than {max_bytes // 2**20} MiB; not a config file.")
        content = path.read_bytes()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ValueError(f"cannot read {path}: {reason}.") from error
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}).") from error


def check_writable(path: str | Path) -> Path:
    """Return ``path`` if a file can be written there; called before minutes of work, not after.

    Raises:
        ValueError: ``path`` is a folder, or its folder cannot be made or written.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder. Pass a file name.")
    probe = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"cannot write {path}: {reason.lower()}. Choose another output place."
        ) from error
    return path
