"""One training run, from its model and data to its result and record."""

import json
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from nabla_attn.errors import first_line
from nabla_attn.files import write_text
from nabla_attn.record import RunRecord, collect_versions, describe_device
from nabla_attn.training.check import foresee, probe
from nabla_attn.training.checkpoint import Checkpoints, SaveFailed
from nabla_attn.training.config import TrainConfig, to_plain
from nabla_attn.training.memory import REMEDY, estimate_training
from nabla_attn.training.metrics import curve, draw_losses, read_log
from nabla_attn.training.model import load_parts, save_lora, save_pipeline
from nabla_attn.training.setup import TrainRun, prepare
from nabla_attn.training.state import whole_weights
from nabla_attn.training.trainer import OnLog, Sample, Trainer

# Called with the name of the run folder and, by name, what is known before the first step.
OnStart = Callable[[str, dict[str, str]], None]


def train(
    config: TrainConfig,
    model: Path,
    folder: Path,
    *,
    resume: bool = False,
    allow_changes: bool = False,
    dataset: Any = None,
    on_start: OnStart = lambda stage, facts: None,
    on_log: OnLog = lambda metrics: None,
    sample: Sample | None = None,
) -> Path:
    """Train to the end and save the result.

    Args:
        config: The configuration, of one stage.
        model: The pipeline directory.
        folder: The run folder.
        resume: Whether to continue a run that is in the folder.
        allow_changes: Whether to continue even though the configuration changed.
        dataset: Encoded clips; None reads `config.data.folder`.
        on_start: Called before the first step with what is known by then, on the first process.
        on_log: Called with the metrics of every logged step, on the first process.
        sample: Function that generates samples during training.

    Returns:
        The result: a pipeline directory, or a folder with LoRA weights.

    Raises:
        ValueError: Something does not fit, before any step; or training had to stop.
        SaveFailed: The last checkpoint or the result could not be written.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the checkpoint is saved first.
    """
    refuse_begun(folder, resume)
    refuse_nested(config, model, folder)
    run = prepare(config, load_parts(model, config.part), dataset)
    memory = estimate_training(run)
    memory.check(run.accelerator.device, "training", REMEDY)
    seconds = probe(run)
    trainer = Trainer(run, folder, on_log=on_log, sample=sample)
    with _alone(folder) if trainer.is_main else nullcontext():
        if resume:
            trainer.resume(allow_changes=allow_changes)
        if trainer.is_main:
            write_text(folder / "config.json", json.dumps(to_plain(config), indent=2) + "\n")
            left = config.steps - trainer.step
            on_start(folder.name, foresee(run, left, 3 * seconds, memory))
        trainer.fit()
        return finish(run, trainer)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder; the lock ends with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / ".lock", blocking=False).acquire()
    except Timeout:
        raise ValueError(f"another run writes to {folder} now. Choose another --output.") from None
    with lock:
        yield


def refuse_begun(folder: Path, resume: bool) -> None:
    """Check that no other run is in the folder.

    Raises:
        ValueError: There is one, and `resume` is not set.
    """
    if Checkpoints(folder / "checkpoints").latest() and not resume:
        raise ValueError(
            f"{folder} holds a run already. Pass --resume to continue it, or another --output."
        )


def refuse_nested(config: TrainConfig, model: Path, folder: Path) -> None:
    """Check that a result that copies the model is not written inside of it.

    Raises:
        ValueError: It would be.
    """
    if not config.lora.rank and folder.resolve().is_relative_to(model.resolve()):
        raise ValueError(
            f"{folder} is inside the model {model}, which the result copies. Choose another "
            "--output."
        )


def finish(run: TrainRun, trainer: Trainer) -> Path:
    """Save the result, the chart and the record of a run that is done.

    Returns:
        The result's folder.

    Raises:
        SaveFailed: The result could not be written.
    """
    folder = trainer.folder
    result = folder / ("lora" if run.config.lora.rank else "pipeline")
    # On a CPU the weights are not copied: they are the averaged ones inside the block alone.
    with run.averaged():
        weights = whole_weights(run)
        if trainer.is_main:
            _save_result(run, trainer, weights, result)
    if trainer.is_main:
        rows = read_log(folder)
        draw_losses(curve(rows, "loss"), curve(rows, "validation"), folder / "loss.png")
        _record(run, trainer, rows).save(folder / "training.json")
    run.accelerator.wait_for_everyone()
    return result


def _save_result(run: TrainRun, trainer: Trainer, weights: dict[str, Tensor], result: Path) -> None:
    try:
        save = save_lora if run.config.lora.rank else save_pipeline
        is_guided = run.config.objective.is_guided
        save(run.parts, weights, result, run.sparsity.asked, is_guided=is_guided)
    # As in `Checkpoints.save`: a full disk has many types.
    except Exception as error:
        raise SaveFailed(
            f"{result} not written ({first_line(error)}). Nothing is lost: "
            f"{trainer.checkpoints.latest()} has what was trained. Make room and run the same "
            "command with --resume."
        ) from error


def _record(run: TrainRun, trainer: Trainer, rows: list[dict[str, str]]) -> RunRecord:
    config = run.config
    losses, validation = curve(rows, "loss"), curve(rows, "validation")
    finite = [loss for _, loss in losses if math.isfinite(loss)]
    speeds = [value for _, value in curve(rows, "tokens_per_second")]
    return RunRecord(
        kind="train",
        config=to_plain(config),
        seed=config.seed,
        versions=collect_versions(),
        device=describe_device(run.accelerator.device),
        numbers={
            "steps": trainer.step,
            "processes": run.accelerator.num_processes,
            "clips": len(run.loader.trained_on),
            "seconds": round(trainer.seconds, 2),
            "skipped": trainer.skipped,
            "last_loss": finite[-1] if finite else None,
            "validation": [[step, loss] for step, loss in validation if math.isfinite(loss)],
            "tokens_per_second": round(statistics.median(speeds), 1) if speeds else None,
            "density": [round(value, 4) for value in run.sparsity.densities()],
        },
    )
