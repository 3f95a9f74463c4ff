"""What verbs print: results, tables, JSON, warnings, and the names of files they write."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from shutil import get_terminal_size
from typing import Any

import typer

from nabla_attn.errors import Note

GAP = 2  # blanks between the columns of a table
# Notes of libraries that ask nothing of a user, or that a warning of ours says better.
HARMLESS = (
    "Already found a `peft_config`",
    "Expected types for",
    "Guiders are currently an experimental",
    "In CPU autocast",
    "`CLIPImageProcessor` requires torchvision",
    "Loading adapter weights from",
    "No LoRA keys associated to",
    "Some weights of",
    "The config attributes",
    "The following part of your input was truncated",
    "Token indices sequence length is longer",
    "`torch_dtype` is deprecated",
)


class Settings:
    """The switches that every verb has; read where something is printed."""

    is_quiet = False


def say(text: str) -> None:
    """Print a result on stdout, unless --quiet."""
    if not Settings.is_quiet:
        typer.echo(text)


def notice(kind: str, message: str) -> None:
    """Print a line on stderr: an "error", a "warning" or a "note"."""
    if kind != "note" or not Settings.is_quiet:
        typer.echo(f"{kind}: {' '.join(message.split())}", err=True)


def print_json(values: dict[str, Any]) -> None:
    """Print one JSON object on stdout."""
    typer.echo(json.dumps(values, indent=2, default=str))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, unless --quiet: whole cells always, in several parts where it is too wide."""
    if not Settings.is_quiet:
        width = get_terminal_size().columns if sys.stdout.isatty() else None
        typer.echo("\n".join(table_lines(header, rows, width)))


def table_lines(
    header: Sequence[str], rows: Sequence[Sequence[str]], width: int | None
) -> list[str]:
    """A table of plain text, its first column left and the others right.

    Args:
        header: The headings.
        rows: The cells.
        width: Columns of the terminal; where the table has more, the rest stands in further parts
            behind the first column again. None means that any width will do.
    """
    sizes = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    parts: list[list[int]] = [[]]
    for index in range(1, len(sizes)):
        taken = sizes[0] + sum(sizes[each] + GAP for each in [*parts[-1], index])
        if width is not None and taken > width and parts[-1]:
            parts.append([])
        parts[-1].append(index)
    lines: list[str] = []
    for part in parts:
        lines += [""] if lines else []
        for row in (header, ["-" * size for size in sizes], *rows):
            cells = [row[index].rjust(sizes[index] + GAP) for index in part]
            lines.append((row[0].ljust(sizes[0]) + "".join(cells)).rstrip())
    return lines


def free_path(path: Path, *, overwrite: bool) -> Path:
    """The path itself, or the next free name beside it with a note, so that nothing is replaced.

    Args:
        path: The file or folder to write.
        overwrite: Take the path as it is.
    """
    is_taken = path.is_file() or (path.is_dir() and any(path.iterdir()))
    if overwrite or not is_taken:
        return path
    number = 2
    while (free := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    notice("note", f"{path} exists: writing {free}. Pass --overwrite to replace it.")
    return free


def warn_once() -> Callable[..., None]:
    """A `warnings.showwarning` that says every message once."""
    said: set[str] = set()

    def show(message: Any, category: type[Warning], *_: Any) -> None:
        text = str(message)
        if text not in said and not text.startswith(HARMLESS):
            said.add(text)
            notice("note" if issubclass(category, Note) else "warning", text)

    return show
