"""Checkpoints: folders that appear whole or not at all; the last ones and the best are kept."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nabla_attn.errors import first_line
from nabla_attn.files import read_json

_STATE = "state.json"


class SaveFailed(OSError):
    """A checkpoint could not be written; earlier ones are untouched."""


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path` that becomes `path` if the block succeeds.

    The files are on the disk before the name is, so a power cut leaves no half checkpoint either.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.iterdir():
            _sync(file)
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run.

    Attributes:
        folder: Where they are kept, each as `step-<number>`.
        keep: How many of the last are kept.
        best: Whether the one of the lowest finite validation loss is kept as well.
    """

    folder: Path
    keep: int = 2
    best: bool = True

    def latest(self) -> Path | None:
        """The newest checkpoint."""
        return max(self._found(), default=None)

    def save(self, step: int, state: dict[str, Any], write: Callable[[Path], None]) -> None:
        """Write a checkpoint and drop those that are no longer kept.

        Args:
            step: Optimiser steps that are done.
            state: Plain JSON values; "validation" is the validation loss or None.
            write: Writes the tensors into a folder.

        Raises:
            SaveFailed: It could not be written; says what is left.
        """
        path = self.folder / f"step-{step:08d}"
        if path.exists():
            return
        # What killed processes were writing or removing.
        for leftover in self.folder.glob(".step-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            with whole_folder(path) as temporary:
                write(temporary)
                text = json.dumps(state | {"step": step}, indent=1)
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
        return sorted(self.folder.glob("step-*"))

    def _prune(self) -> None:
        found = self._found()
        kept = set(found[-self.keep :])
        if self.best:
            losses = {path: read_state(path).get("validation") for path in found}
            measured = {
                path: loss
                for path, loss in losses.items()
                if loss is not None and math.isfinite(loss)
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
    """The plain values of a checkpoint.

    Raises:
        ValueError: The folder is not a checkpoint.
    """
    try:
        state: dict[str, Any] = read_json(path / _STATE)
    except ValueError as error:
        raise ValueError(f"{path} is not a checkpoint: {error}") from error
    return state


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
