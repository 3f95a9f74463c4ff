"""The metrics of a run: `log.csv`, tensorboard, and the chart of its losses."""

import csv
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nabla_attn.files import whole_file

_NAME = "log.csv"


Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class StepMetrics:
    """The metrics of a step.

    Attributes:
        step: Number of optimiser steps done.
        steps: Number of optimiser steps in all.
        numbers: Values by name: loss and its terms, lr, norm, seconds, tokens_per_second, density,
            skipped, validation.
        layers: Density of every layer.
        stage: Name of the stage; empty where there is only one.
    """

    step: int
    steps: int
    numbers: dict[str, float]
    layers: list[float] = field(default_factory=list)
    stage: str = ""

    def row(self) -> dict[str, float]:
        """All numbers, flat."""
        layers = {f"density_{index}": value for index, value in enumerate(self.layers)}
        return {"step": self.step} | self.numbers | layers


class MetricsLogger:
    """Writes the metrics of steps; nothing that fails here stops a run.

    Args:
        folder: The run folder.
        step: Number of steps done; later rows of an interrupted run are cut.
        tensorboard: Whether to write for tensorboard as well.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool) -> None:
        self._path = folder / _NAME
        self._rows = [row for row in read_log(folder) if int(row["step"]) <= step]
        self._columns = list(self._rows[0]) if self._rows else []
        # After a failure the file may end within a row.
        self._is_whole = True
        self._writer = _summary_writer(folder / "tensorboard", step) if tensorboard else None
        if self._path.exists():
            self._rewrite()

    def add(self, metrics: StepMetrics) -> None:
        """Write the metrics of a step."""
        row = {name: f"{value:.8g}" for name, value in metrics.row().items()}
        self._rows.append(row)
        try:
            self._append(row)
            self._is_whole = True
        except OSError as error:
            self._is_whole = False
            warnings.warn(f"{self._path} not written: {error.strerror}.", stacklevel=2)
        with self._without_writer_on_failure():
            for name, number in metrics.row().items():
                if self._writer is not None:
                    self._writer.add_scalar(name, number, metrics.step)

    def close(self) -> None:
        """Finish the tensorboard file."""
        with self._without_writer_on_failure():
            if self._writer:
                self._writer.close()

    @contextmanager
    def _without_writer_on_failure(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # It never recovers: the same failure is raised again and again.
            self._writer = None
            warnings.warn(f"tensorboard's log ends: {error.strerror}.", stacklevel=4)

    def _append(self, row: dict[str, str]) -> None:
        new = [name for name in row if name not in self._columns]
        if new or not self._is_whole:
            self._columns += new
            self._rewrite()
            return
        with self._path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _rewrite(self) -> None:
        with (
            whole_file(self._path) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(self._rows)


def read_log(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's log, as text; a last line cut by a kill is left out."""
    path = folder / _NAME
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if (row.get("step") or "").isdigit()]
    return [{key: value or "" for key, value in row.items() if key} for row in rows]


def curve(rows: list[dict[str, str]], name: str) -> Curve:
    """(step, value) of one column, where it was measured."""
    return [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]


def _summary_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        warnings.warn(
            "tensorboard is not installed: only log.csv is written. Set watch.tensorboard=false.",
            stacklevel=3,
        )
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


def draw_losses(training: Curve, validation: Curve, path: Path) -> None:
    """Write the chart as PNG, whole or not at all.

    Args:
        training: Steps and losses of training; drawn with their running mean.
        validation: Steps and losses on the held-out clips.
        path: The PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    if training:
        steps, losses = zip(*training, strict=True)
        axes.plot(steps, losses, color="#b8c4d0", linewidth=0.8, label="training, each step")
        axes.plot(steps, _running_mean(losses), color="#1b1f24", label="training, running mean")
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", color="#0f766e", label="validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    if all(loss > 0 for _, loss in [*training, *validation]):
        axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    if training or validation:
        axes.legend(frameon=False)
    with whole_file(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary), metadata={"Software": None})


def _running_mean(values: tuple[float, ...]) -> list[float]:
    """Mean over a twentieth of the run up to each value."""
    width = max(1, len(values) // 20)
    means = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - width) : end]
        means.append(sum(part) / len(part))
    return means
