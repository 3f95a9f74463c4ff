"""Training on stderr: what a run will take, then bars, or lines where it is no terminal."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from nabla_attn.cli.output import Settings

if TYPE_CHECKING:
    from nabla_attn.training.config import TrainConfig
    from nabla_attn.training.metrics import StepMetrics

LINE_SECONDS = 30.0
"""Seconds between two lines of progress where stderr is no terminal."""


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
    from rich.console import Console

    from nabla_attn.distributed import is_first_process

    console = Console(stderr=True)
    if Settings.is_quiet or not is_first_process():
        yield lambda metrics: None
    elif console.is_terminal:
        with _bars(console) as show:
            yield show
    else:
        yield _lines()


@contextmanager
def _bars(console: Any) -> Iterator[Callable[["StepMetrics"], None]]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}

        def show(metrics: "StepMetrics") -> None:
            stage = metrics.stage
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage or "train", total=metrics.steps, numbers="")
            numbers = describe_metrics(metrics)
            bars.update(tasks[stage], completed=metrics.step, numbers=numbers)

        yield show


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
