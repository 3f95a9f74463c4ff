"""`train` runs a configuration from its model to its result; `check` looks before the long work."""

import json
import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from nabla_attn.errors import first_line
from nabla_attn.files import write_text
from nabla_attn.record import RunRecord, collect_versions, describe_device
from nabla_attn.training.chart import draw_losses
from nabla_attn.training.check import probe
from nabla_attn.training.checkpoint import Checkpoints, SaveFailed
from nabla_attn.training.config import TrainConfig
from nabla_attn.training.logbook import curve, read_log
from nabla_attn.training.model import load_parts, save_lora, save_pipeline
from nabla_attn.training.overrides import to_plain
from nabla_attn.training.setup import Run, prepare
from nabla_attn.training.state import whole_weights
from nabla_attn.training.trainer import Report, Sample, Trainer


def train(
    config: TrainConfig,
    model: Path,
    folder: Path,
    *,
    resume: bool = False,
    allow_changes: bool = False,
    dataset: Any = None,
    report: Report = lambda entry: None,
    sample: Sample | None = None,
) -> Path:
    """Train to the end and save the result.

    Args:
        config: What to do.
        model: The pipeline directory.
        folder: The run folder.
        resume: Go on where a run in the folder stopped, if there is one.
        allow_changes: Go on even though the configuration changed.
        dataset: Encoded clips; None reads `config.data.folder`.
        report: Told about every logged step.
        sample: Makes samples on the way.

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
    probe(run)
    trainer = Trainer(run, folder, report=report, sample=sample)
    with _alone(folder) if trainer.is_main else nullcontext():
        if resume:
            trainer.resume(allow_changes=allow_changes)
        if trainer.is_main:
            write_text(folder / "config.json", json.dumps(to_plain(config), indent=2) + "\n")
        trainer.fit()
        return finish(run, trainer)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder; the system lets go when the process ends, however."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / ".lock", blocking=False).acquire()
    except Timeout:
        raise ValueError(f"another run writes to {folder} now. Choose another --output.") from None
    with lock:
        yield


def refuse_begun(folder: Path, resume: bool) -> None:
    """See that no other run is in the folder.

    Raises:
        ValueError: There is one, and it is not to be resumed.
    """
    if Checkpoints(folder / "checkpoints").latest() and not resume:
        raise ValueError(
            f"{folder} holds a run already. Pass --resume to go on with it, or another --output."
        )


def refuse_nested(config: TrainConfig, model: Path, folder: Path) -> None:
    """See that a result that copies the model is not written inside of it.

    Raises:
        ValueError: It would be.
    """
    if not config.lora.rank and folder.resolve().is_relative_to(model.resolve()):
        raise ValueError(
            f"{folder} is inside the model {model}, which the result is a copy of. Choose another "
            "--output."
        )


def finish(run: Run, trainer: Trainer) -> Path:
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


def _save_result(run: Run, trainer: Trainer, weights: dict[str, Tensor], result: Path) -> None:
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


def _record(run: Run, trainer: Trainer, rows: list[dict[str, str]]) -> RunRecord:
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
            "clips": len(run.feed.trained_on),
            "seconds": round(trainer.seconds, 2),
            "skipped": trainer.skipped,
            "last_loss": finite[-1] if finite else None,
            "validation": [[step, loss] for step, loss in validation if math.isfinite(loss)],
            "tokens_per_second": round(statistics.median(speeds), 1) if speeds else None,
            "density": [round(value, 4) for value in run.sparsity.densities()],
        },
    )
