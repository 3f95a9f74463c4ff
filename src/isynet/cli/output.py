"""Options that several verbs share, and what they print: a table for readers, or JSON."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from nabla_attn.cli.output import print_json, print_table
from nabla_attn.progress import ProgressCallback

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Model = Annotated[
    str,
    typer.Argument(help="A published network such as isynet-n1, an architecture, or a file."),
]
Size = Annotated[int, typer.Option(min=1, help="Pixels of the image's sides.")]
Machine = Annotated[
    str, typer.Option(help="ascend310, here (after `isynet measure`), or a file of rates.")
]


def print_rows(rows: Sequence[dict[str, Any]], *, as_json: bool) -> None:
    """Print dictionaries of equal keys as a table, or as JSON with every digit."""
    if as_json:
        print_json({"rows": list(rows)})
    elif rows:
        print_table(list(rows[0]), [[_show(value) for value in row.values()] for row in rows])


def warn_unknown(name: str, unknown: dict[str, int]) -> None:
    """Say which operators of a network a count has no rule for."""
    if unknown:
        names = ", ".join(sorted(unknown))
        warnings.warn(f"{name} has operators that are not counted: {names}.", stacklevel=2)


@contextmanager
def progress_bar(label: str) -> Iterator[ProgressCallback]:
    """Yield a progress callback that shows a bar on stderr, where stderr is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}  {task.fields[stage]}"),
        TimeElapsedColumn(),
    )
    is_shown = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not is_shown) as bar:
        task = bar.add_task(label, total=None, stage="")

        def show(stage: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, stage=stage)

        yield show


def _show(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)
