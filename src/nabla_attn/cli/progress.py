"""Progress bars of generations on stderr: stage, steps, steps per second, time left."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nabla_attn.cli.output import Settings

if TYPE_CHECKING:
    from rich.progress import TaskID

    from nabla_attn.progress import ProgressCallback

STAGES = {"warm-up": "warming up", "text": "reading the prompt", "decode": "decoding"}


@contextmanager
def generation_bars(*, in_logs: bool = False) -> Iterator[Callable[[str], "ProgressCallback"]]:
    """Yield a function from a label to the progress callback of its own bar.

    Args:
        in_logs: a line per label where stderr is no terminal; nothing otherwise.
    """
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[stage]}"),
        TimeElapsedColumn(),
    )
    # Transient, so that an error stays the one line on stderr.
    console = Console(stderr=True)
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:

        def start(label: str) -> "ProgressCallback":
            if in_logs and not console.is_terminal:
                console.print(label, highlight=False)
            task = bars.add_task(label, total=None, stage="")
            began = time.perf_counter()

            def show(stage: str, done: int, total: int) -> None:
                nonlocal began
                if stage == "denoise":
                    if done == 0:
                        began = time.perf_counter()
                    text = _describe_steps(done, total, time.perf_counter() - began)
                    bars.update(task, total=total, completed=done, stage=text)
                elif stage == "done":
                    bars.update(task, stage="done")
                    bars.stop_task(task)
                else:
                    bars.update(task, stage=STAGES[stage])

            return show

        yield start


@contextmanager
def loading_bars() -> Iterator["ProgressCallback"]:
    """Yield the progress callback of bars on stderr, one a stage, for loading or converting."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    # Transient, so that an error stays the one line on stderr.
    console = Console(stderr=True)
    is_shown = console.is_terminal and not Settings.is_quiet
    with Progress(*columns, console=console, transient=True, disable=not is_shown) as bars:
        tasks: dict[str, "TaskID"] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage)
            bars.update(tasks[stage], completed=done, total=total)

        yield show


@contextmanager
def count_bar(
    label: str, unit: str, *, every_seconds: float = 30.0
) -> Iterator["ProgressCallback"]:
    """Yield a progress callback that moves a bar, or writes lines where stderr is no terminal.

    Args:
        label: The name of the work.
        unit: The plural of what is counted.
        every_seconds: Seconds from one line in a log file to the next.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (label, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Transient, so that an error stays the one line on stderr.
    console = Console(stderr=True)
    is_shown = console.is_terminal and not Settings.is_quiet
    first = None
    last = time.perf_counter()
    with Bars(*columns, console=console, transient=True, disable=not is_shown) as bars:
        task = bars.add_task(label, total=None)

        def show(stage: str, done: int, total: int) -> None:
            nonlocal first, last
            now = time.perf_counter()
            first = first or (done, now)
            bars.update(task, completed=done, total=total)
            if not Settings.is_quiet and not is_shown and now - last >= every_seconds:
                last = now
                text = _describe_speed(done, total, done - first[0], now - first[1], unit)
                print(f"{label}: {text}", file=sys.stderr, flush=True)  # noqa: T201

        yield show


def _describe_speed(done: int, total: int, made: int, seconds: float, unit: str) -> str:
    """Such as `64 of 1024 clips, 3.20 clips/s, 300 s left`."""
    text = f"{done} of {total} {unit}"
    if not made or not seconds:
        return text
    rate = made / seconds
    return f"{text}, {rate:.2f} {unit}/s, {(total - done) / rate:.0f} s left"


def _describe_steps(done: int, total: int, seconds: float) -> str:
    """Such as ``3/20  1.4 steps/s  12 s left``."""
    if not done or not seconds:
        return f"{done}/{total}"
    rate = done / seconds
    speed = f"{rate:.1f} steps/s" if rate >= 1 else f"{1 / rate:.1f} s/step"
    return f"{done}/{total}  {speed}  {(total - done) / rate:.0f} s left"
