"""Progress on stderr: bars on a terminal, and in log files a line now and then."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from nabla_attn.cli.output import Settings

if TYPE_CHECKING:
    from rich.progress import Progress

    from nabla_attn.progress import ProgressCallback
    from nabla_attn.training.config import TrainConfig
    from nabla_attn.training.metrics import StepMetrics

LINE_SECONDS = 30.0
"""Seconds between two lines of progress where stderr is no terminal."""

STAGES = {"warm-up": "warming up", "text": "reading the prompt", "decode": "decoding"}


@contextmanager
def generation_bars(
    *, in_logs: bool = False, every_seconds: float = LINE_SECONDS
) -> Iterator[Callable[[str], "ProgressCallback"]]:
    """Yield a function from a label to the progress callback of its own bar.

    Where stderr is no terminal, the callback writes a line every some seconds instead.

    Args:
        in_logs: Whether to write a line per label where stderr is no terminal.
        every_seconds: Seconds from one line in a log file to the next.
    """
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn

    texts = (TextColumn("{task.description}"), TextColumn("{task.fields[stage]}"))
    columns = (texts[0], BarColumn(), texts[1], TimeElapsedColumn())
    with _bars(*columns, is_quiet=Settings.is_quiet) as bars:
        is_logged = bars.disable and not Settings.is_quiet

        def start(label: str) -> "ProgressCallback":
            if in_logs and is_logged:
                _write_line(label)
            task = bars.add_task(label, total=None, stage="")
            began = last = time.perf_counter()

            def show(stage: str, done: int, total: int) -> None:
                nonlocal began, last
                now = time.perf_counter()
                text = STAGES.get(stage, stage)
                if stage == "denoise":
                    if done == 0:
                        began = now
                    text = _describe_steps(done, total, now - began)
                    bars.update(task, total=total, completed=done)
                bars.update(task, stage=text)
                if stage == "done":
                    bars.stop_task(task)
                elif is_logged and now - last >= every_seconds:
                    last = now
                    _write_line(f"{label}: {text}")

            return show

        yield start


@contextmanager
def loading_bars() -> Iterator["ProgressCallback"]:
    """Yield the progress callback of bars on stderr, one a stage, for loading or converting."""
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with _bars(*columns, is_quiet=Settings.is_quiet) as bars:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage)
            bars.update(tasks[stage], completed=done, total=total)

        yield show


@contextmanager
def count_bar(
    label: str, unit: str, *, every_seconds: float = LINE_SECONDS
) -> Iterator["ProgressCallback"]:
    """Yield a progress callback that moves a bar, or writes lines where stderr is no terminal.

    Args:
        label: The name of the work.
        unit: The plural of what is counted.
        every_seconds: Seconds from one line in a log file to the next.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

    columns = (label, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    first = None
    last = time.perf_counter()
    with _bars(*columns, is_quiet=Settings.is_quiet) as bars:
        task = bars.add_task(label, total=None)

        def show(stage: str, done: int, total: int) -> None:
            nonlocal first, last
            now = time.perf_counter()
            first = first or (done, now)
            bars.update(task, completed=done, total=total)
            if not Settings.is_quiet and bars.disable and now - last >= every_seconds:
                last = now
                text = _describe_speed(done, total, done - first[0], now - first[1], unit)
                _write_line(f"{label}: {text}")

        yield show


def _write_line(text: str) -> None:
    typer.echo(" ".join(text.split()), err=True)


def _describe_speed(done: int, total: int, made: int, seconds: float, unit: str) -> str:
    """Such as `64 of 1024 clips, 3.20 clips/s, 300 s left`."""
    text = f"{done} of {total} {unit}"
    if not made or not seconds:
        return text
    rate = made / seconds
    return f"{text}, {rate:.2f} {unit}/s, {(total - done) / rate:.0f} s left"


def _describe_steps(done: int, total: int, seconds: float) -> str:
    """Such as `3/20  1.4 steps/s  12 s left`."""
    if not done or not seconds:
        return f"{done}/{total}"
    rate = done / seconds
    speed = f"{rate:.1f} steps/s" if rate >= 1 else f"{1 / rate:.1f} s/step"
    return f"{done}/{total}  {speed}  {(total - done) / rate:.0f} s left"


def show_start(config: "TrainConfig") -> Callable[[str, dict[str, str]], None]:
    """A callback that shows what differs from the recipe, once, and what each stage will take."""
    from nabla_attn.training.config import differences, to_plain
    from nabla_attn.training.recipes import find_recipe

    changed = differences(to_plain(find_recipe(config.recipe)), to_plain(config))

    def show(stage: str, facts: dict[str, str]) -> None:
        if Settings.is_quiet:
            return
        if changed:
            typer.echo(f"{config.recipe}, with", err=True)
        while changed:
            typer.echo(f"  {changed.pop(0)}", err=True)
        for name, text in ({"stage": stage} | facts if config.stages else facts).items():
            typer.echo(f"{name + ':':<8} {text}", err=True)

    return show


@contextmanager
def show_progress() -> Iterator[Callable[["StepMetrics"], None]]:
    """Yield a callback for the metrics of steps: a bar a stage, or now and then a line."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    from nabla_attn.distributed import is_first_process

    if Settings.is_quiet or not is_first_process():
        yield lambda metrics: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(),
    )
    # What a run came to stays on the screen.
    with _bars(*columns, is_transient=False) as bars:
        tasks: dict[str, Any] = {}

        def show(metrics: "StepMetrics") -> None:
            stage = metrics.stage
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage or "train", total=metrics.steps, numbers="")
            numbers = describe_metrics(metrics)
            bars.update(tasks[stage], completed=metrics.step, numbers=numbers)

        yield _lines() if bars.disable else show


def _bars(*columns: Any, is_quiet: bool = False, is_transient: bool = True) -> "Progress":
    """Bars on stderr; disabled where it is no terminal. Transient ones leave an error alone."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    is_hidden = is_quiet or not console.is_terminal
    return Progress(*columns, console=console, transient=is_transient, disable=is_hidden)


def _lines(clock: Callable[[], float] = time.monotonic) -> Callable[["StepMetrics"], None]:
    """A callback that prints the first and last step of a stage, and one every some seconds."""
    # Stage -> time and step of its first report; time of the last line.
    first: dict[str, tuple[float, int]] = {}
    last = -LINE_SECONDS

    def show(metrics: "StepMetrics") -> None:
        nonlocal last
        from nabla_attn.training.check import describe_seconds

        now = clock()
        is_new = metrics.stage not in first
        began, start = first.setdefault(metrics.stage, (now, metrics.step))
        if not is_new and metrics.step < metrics.steps and now - last < LINE_SECONDS:
            return
        last = now
        parts = [f"{metrics.stage} step {metrics.step:,}/{metrics.steps:,}".strip()]
        if numbers := describe_metrics(metrics):
            parts.append(numbers)
        if start < metrics.step < metrics.steps:
            left = (now - began) / (metrics.step - start) * (metrics.steps - metrics.step)
            parts.append(f"ETA {describe_seconds(left)}")
        typer.echo("  ".join(parts), err=True)

    return show


def describe_metrics(metrics: "StepMetrics") -> str:
    """The known ones of `loss 0.0123  4,096 tokens/s  density 0.31 (0.22-0.40)` and so on."""
    numbers = metrics.numbers
    parts = []
    if "loss" in numbers:
        parts.append(f"loss {numbers['loss']:.4g}")
    if "tokens_per_second" in numbers:
        parts.append(f"{numbers['tokens_per_second']:,.0f} tokens/s")
    if metrics.layers:
        low, high = min(metrics.layers), max(metrics.layers)
        parts.append(f"density {numbers['density']:.2f} ({low:.2f}-{high:.2f})")
    if "validation" in numbers:
        parts.append(f"validation {numbers['validation']:.4g}")
    if numbers.get("skipped"):
        parts.append(f"{numbers['skipped']:.0f} skipped")
    return "  ".join(parts)
