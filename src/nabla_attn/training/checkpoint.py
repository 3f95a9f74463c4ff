"""Checkpoints: folders that appear whole or not at all; the last ones and the best are kept.

A checkpoint is a folder named `step-` and eight digits. Its `state.json` holds the hash of every
other file, and one of itself, so that a flipped bit is found before anything is loaded.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nabla_attn.errors import first_line
from nabla_attn.files import read_json

_STATE = "state.json"
_NAME = re.compile(r"step-(\d{8})")
_LEFTOVER = re.compile(r"\.step-\d{8}\.(tmp|old)")


class SaveFailed(OSError):
    """A checkpoint could not be written; earlier ones are untouched."""


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path` that takes its place if the block succeeds.

    The files are on the disk before the name is, so a power cut leaves no half folder either.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        shutil.rmtree(path, ignore_errors=True)
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run.

    Attributes:
        folder: Folder of the checkpoints; other names in it are left alone.
        keep: Number of the last ones that are kept.
        best: Whether the one of the lowest finite validation loss is kept as well.
    """

    folder: Path
    keep: int = 2
    best: bool = True

    def latest(self) -> Path | None:
        """The newest checkpoint."""
        return max(self._found(), default=None)

    def before(self, path: Path) -> Path | None:
        """The checkpoint before another one."""
        return max((found for found in self._found() if found < path), default=None)

    def save(self, step: int, state: dict[str, Any], write: Callable[[Path], None]) -> None:
        """Write a checkpoint and drop those that are no longer kept.

        Args:
            step: Number of optimiser steps that are done.
            state: Plain JSON values; "validation" is the validation loss or None.
            write: Function that writes the tensors into a folder.

        Raises:
            SaveFailed: It could not be written; the last good one is named.
        """
        path = self.folder / f"step-{step:08d}"
        if path.exists():
            return
        # Left by processes that were killed while writing or removing.
        for leftover in self.folder.glob(".step-*"):
            if _LEFTOVER.fullmatch(leftover.name):
                shutil.rmtree(leftover, ignore_errors=True)
        try:
            with whole_folder(path) as temporary:
                write(temporary)
                files = {file.name: _hash_file(file) for file in sorted(temporary.iterdir())}
                whole = state | {"step": step, "files": files}
                text = json.dumps(whole | {"hash": _hash_state(whole)}, indent=1)
                (temporary / _STATE).write_text(text + "\n", encoding="utf-8")
        # A full disk is an OSError from Python, a RuntimeError from torch, an error of its own
        # from safetensors.
        except Exception as error:
            last = self.latest()
            left = f"{last} is the last good one" if last else "there is none yet"
            raise SaveFailed(
                f"checkpoint of step {step} not written ({first_line(error)}); {left}."
            ) from error
        self._prune()

    def _found(self) -> list[Path]:
        found = self.folder.glob("step-*")
        return sorted(path for path in found if _NAME.fullmatch(path.name) and path.is_dir())

    def _prune(self) -> None:
        found = self._found()
        kept = set(found[-self.keep :])
        if self.best:
            measured = {
                path: loss for path in found if (loss := _validation_loss(path)) is not None
            }
            if measured:
                kept.add(min(measured, key=lambda path: measured[path]))
        for path in found:
            if path not in kept:
                # Renamed first, so that a kill leaves no half of a checkpoint under its name.
                doomed = path.with_name(f".{path.name}.old")
                path.replace(doomed)
                shutil.rmtree(doomed, ignore_errors=True)


def read_state(path: Path) -> dict[str, Any]:
    """The plain values of a checkpoint, checked.

    Raises:
        ValueError: The folder is not a checkpoint, or `state.json` is not what was written.
    """
    try:
        # The loss of a run that diverges is NaN.
        state = read_json(path / _STATE, has_nan=True)
    except ValueError as error:
        raise ValueError(f"{path} is not a checkpoint: {error}") from error
    if fault := _find_fault(state, path):
        raise ValueError(f"{path / _STATE} is damaged: {fault}.")
    return dict(state)


def verify(path: Path) -> None:
    """Check that the files of a checkpoint are those that were written.

    Checkpoints without hashes, which earlier versions wrote, pass.

    Raises:
        ValueError: A file is missing or changed; it is named.
    """
    for name, written in read_state(path).get("files", {}).items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"damaged checkpoint: {file} is missing.")
        if _hash_file(file) != written:
            raise ValueError(f"{file} is damaged: its SHA-256 is not the one in {_STATE}.")


def _find_fault(state: Any, path: Path) -> str | None:
    """The fault in the values of a checkpoint, or None."""
    if not isinstance(state, dict):
        return f"expected an object, got {type(state).__name__}"
    written = state.get("hash")
    if written is not None and written != _hash_state(state):
        return "its SHA-256 is not the one that it states"
    step, named = state.get("step"), _NAME.fullmatch(path.name)
    if type(step) is not int or (named and step != int(named[1])):
        return f"step must be the number in the folder's name, got {step!r}"
    kinds = {
        "config": dict,
        "feed": dict,
        "files": dict,
        "processes": int,
        "skipped": int,
        "skipped_in_a_row": int,
        "seconds": float | int,
        "validation": float | int | None,
        "best": float | int | None,
    }
    for name, kind in kinds.items():
        value = state.get(name)
        if name in state and (not isinstance(value, kind) or isinstance(value, bool)):
            return f"{name} has a value of the wrong type, {str(value)[:40]!r}"
    for name in ("processes", "skipped", "skipped_in_a_row", "seconds"):
        if not 0 <= state.get(name, 0) < math.inf:
            return f"{name} must be 0 or more, got {state[name]}"
    if any(Path(str(name)).name != name for name in state.get("files", ())):
        return "it names files of other folders"
    return None


def _validation_loss(path: Path) -> float | None:
    """The finite validation loss of a checkpoint; None without one, or if it cannot be read."""
    try:
        loss = read_state(path).get("validation")
    except ValueError:
        return None
    return loss if loss is not None and math.isfinite(loss) else None


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_state(state: dict[str, Any]) -> str:
    values = {name: value for name, value in state.items() if name != "hash"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
