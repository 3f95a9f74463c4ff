"""Files that appear whole or not at all, and how they are told apart."""

import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_NAME_BYTES = 200
"""Bytes of a file's name that its temporary file keeps; file systems take 255 in all."""

MAX_DEPTH = 100
"""Objects and lists inside one another that are read; what handles them may recurse."""

MAX_WHOLE = 2**64
"""Whole numbers reach to below this in either direction; larger ones fit no tensor or float."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


@contextmanager
def whole_file(path: str | Path, *, private: bool = False) -> Iterator[Path]:
    """Yield a temporary name in the folder of `path`; it becomes `path` if the block succeeds.

    An exception, Ctrl-C included, removes the temporary file and leaves an earlier `path` alone.
    What was written is on the disk before it gets its name, so a power cut leaves no empty file.

    Args:
        path: The final name. Missing parent folders are made.
        private: Whether only its owner may read the file.

    Raises:
        OSError: The folder cannot be made or written, or the disk is full, whatever a library that
            writes the file makes of that; the file is named.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(mode=0o600 if private else 0o666)
        mode = temporary.stat().st_mode
        yield temporary
        # Some libraries write a new file of theirs, which only its owner may read.
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except Exception as error:
        number = _disk_error(error, temporary)
        if number is None:
            raise
        failure = OSError(f"cannot write {path}: {os.strerror(number).lower()}.")
        failure.errno = number
        raise failure from error
    finally:
        temporary.unlink(missing_ok=True)


def _disk_error(error: Exception, temporary: Path) -> int | None:
    """The number of the failure of the disk that an error comes from, if it does."""
    # Libraries in other languages have it in their text, or nowhere.
    found = re.search(r"os error (\d+)", str(error))
    number = int(found[1]) if found else getattr(error, "errno", None)
    if number is None:
        number = next((each for each in _FULL if os.strerror(each) in str(error)), None)
    if number is None and isinstance(error, RuntimeError):
        number = _try_to_write(temporary)
    return number if number in _FULL else None


def _try_to_write(path: Path) -> int | None:
    """The number of the error that writing more to a file ends in, if it does."""
    try:
        with path.open("ab") as file:
            file.write(bytes(2**16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno
    return None


def _temporary(path: Path) -> Path:
    # Processes of several machines or containers share numbers, so chance tells them apart.
    name = os.fsencode(path.name)[:MAX_NAME_BYTES].decode(errors="ignore")
    return path.with_name(f".{name}.{secrets.token_hex(8)}.tmp")


def read_ends(path: Path, count: int) -> bytes:
    """The first and the last `count` bytes of a file, where one that was replaced differs."""
    with path.open("rb") as file:
        first = file.read(count)
        file.seek(max(0, path.stat().st_size - count))
        return first + file.read(count)


def fingerprint_files(folder: Path, paths: Iterable[Path]) -> str:
    """Hash of names, sizes, and both ends of files of a folder, in their order.

    Weights that were trained further differ everywhere, so their ends suffice; reading them whole
    would take minutes.
    """
    total = hashlib.sha256()
    for path in paths:
        if path.is_file():
            size = path.stat().st_size
            total.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
            total.update(read_ends(path, 65536))
    return total.hexdigest()


def is_whole(path: Path) -> bool:
    """Whether a file is there and has content: what appears whole is never empty."""
    try:
        return path.is_file() and path.stat().st_size > 0
    except FileNotFoundError:  # removed between the two questions
        return False


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | Path, *, max_bytes: int | None = None, has_nan: bool = False) -> Any:
    """What a JSON file holds.

    Args:
        path: The file.
        max_bytes: The largest size that is read; None reads any.
        has_nan: Whether NaN and Infinity, which are not JSON, are read too.

    Raises:
        ValueError: It is missing, too large or not JSON, or `parse_json` refuses it; the file is
            named.
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
        return parse_json(content.decode("utf-8-sig"), has_nan=has_nan)
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}).") from error


def read_object(path: str | Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ValueError: `read_json` refuses it, or it is no object; the file is named.
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected an object, got {type(values).__name__}.")
    return values


def parse_json(text: str, *, has_nan: bool = False) -> Any:
    """What a JSON text holds.

    Args:
        text: The text.
        has_nan: Whether NaN and Infinity, which are not JSON, are read too.

    Raises:
        ValueError: It is not JSON, is nested too deeply, a number is none or beyond 64 bits, or an
            object has a name twice, one of which would be dropped.
    """
    try:
        values = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_whole,
            parse_float=_finite,
            parse_constant=float if has_nan else _refuse_constant,
        )
        odd = _find_odd(values)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if odd is not None:
        raise ValueError(odd.reason)
    check_depth(values)
    return values


def check_depth(values: Any, *, max_values: int | None = None) -> None:
    """Check that plain values are not nested too deeply.

    Args:
        values: Objects, lists and what they hold.
        max_values: The most values that may be there; None is any number.

    Raises:
        ValueError: They are, or are too many.
    """
    level, count = [values], 0
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        count += len(level)
        if max_values is not None and count > max_values:
            raise ValueError(f"it has more than {max_values} values")
        if not level:
            return
    raise ValueError("it is nested too deeply")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of names and values.

    Raises:
        ValueError: A name is there twice, or stands for an odd number.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    for name, value in pairs:
        if (odd := _find_odd(value)) is not None:
            raise ValueError(f"{name}: {odd.reason}")
    return values


@dataclass(frozen=True)
class _Odd:
    """A number that is refused as soon as it is known what it is the value of."""

    reason: str


def _find_odd(value: Any) -> _Odd | None:
    """The first odd number in a value; objects have been looked at already."""
    if isinstance(value, list):
        return next((odd for each in value if (odd := _find_odd(each)) is not None), None)
    return value if isinstance(value, _Odd) else None


def _refuse_constant(name: str) -> _Odd:
    return _Odd(f"{name} is not a number in JSON; a missing one is null")


def _whole(text: str) -> int | _Odd:
    # Texts of more than 20 digits are beyond it whatever they are.
    value = int(text) if len(text) <= 21 else MAX_WHOLE
    if not -MAX_WHOLE < value < MAX_WHOLE:
        return _Odd(f"{text:.20}... is beyond 64 bits")
    return value


def _finite(text: str) -> float | _Odd:
    value = float(text)
    if abs(value) == float("inf"):
        return _Odd(f"{text:.20} is too large a number")
    return value


def read_lines(path: Path, max_bytes: int) -> Iterator[tuple[int, str | ValueError]]:
    """Yield the number of every line with its text, or with what is wrong with it.

    Args:
        path: A UTF-8 text file. Only newlines end a line.
        max_bytes: The longest line that is read.

    Raises:
        ValueError: The file cannot be read; it is named.
    """
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(max_bytes + 1):
                number += 1
                if len(line) > max_bytes:
                    while line and not line.endswith(b"\n"):
                        line = file.readline(max_bytes)
                    yield number, ValueError(f"longer than {max_bytes} bytes")
                    continue
                try:
                    yield number, line.decode("utf-8-sig").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    yield number, ValueError(f"not UTF-8 (byte {error.start + 1})")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ValueError(f"cannot read {path}: {reason}.") from error


def check_writable(path: str | Path) -> Path:
    """Return `path` if a file can be written there; called before minutes of work, not after.

    Raises:
        ValueError: `path` is a folder, or its folder cannot be made or written.
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
