"""The runs of `nabla train`: what is started, and what is printed of its result."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from nabla_attn.cli.loading import quiet_libraries
from nabla_attn.cli.output import print_json, say

if TYPE_CHECKING:
    from nabla_attn.training.config import TrainConfig


def run_training(
    config: "TrainConfig",
    folder: Path,
    resume: bool,
    allow_changes: bool,
    *,
    is_forced: bool,
    as_json: bool,
) -> None:
    """Run or continue the stages of a recipe, and say how the result is used."""
    from nabla_attn.cli.progress import show_progress, show_start
    from nabla_attn.cost.memory import force_memory
    from nabla_attn.distributed import is_first_process
    from nabla_attn.moving_shapes.dataset import MovingShapes
    from nabla_attn.training.job import describe_use, has_checkpoint, run_job

    quiet_libraries()
    try:
        with force_memory(is_forced), show_progress() as on_log:
            result = run_job(
                config,
                folder,
                MovingShapes(),
                resume=resume,
                allow_changes=allow_changes,
                on_start=show_start(config),
                on_log=on_log,
            )
    except KeyboardInterrupt:
        if is_first_process() and has_checkpoint(config, folder):
            typer.echo(f"{folder}: saved. The same command with --resume continues.", err=True)
        raise
    if not is_first_process():
        return
    if as_json:
        _print_result(result, result.parent / "training.json", describe_use(config, result))
        return
    say(f"{result}: done. Use it: {describe_use(config, result)}.")
    if config.objective.is_guided:
        say("it predicts what guidance gave: use it with guidance 1, which is faster.")


def check_training(config: "TrainConfig", folder: Path, *, as_json: bool) -> None:
    """Print what a recipe would do; nothing is trained or written."""
    from nabla_attn.distributed import is_first_process
    from nabla_attn.moving_shapes.dataset import MovingShapes
    from nabla_attn.training.job import check_job

    quiet_libraries()
    stages = check_job(config, folder, MovingShapes())
    if not is_first_process():
        return
    if as_json:
        print_json({"stages": stages})
        return
    for stage, facts in stages.items():
        for name, text in ({"stage": stage} | facts if len(stages) > 1 else facts).items():
            say(f"{name + ':':<11} {text}")
    say("nothing was trained or written.")


def run_builtin(folder: Path, *, as_json: bool) -> None:
    """Train the built-in model from nothing, or continue; on a GPU where there is one."""
    import torch

    from nabla_attn.cli.progress import show_progress
    from nabla_attn.generation.placement import resolve_device
    from nabla_attn.moving_shapes.recipe import builtin
    from nabla_attn.moving_shapes.train import train_builtin

    # Products in bfloat16 where the processor has them: twice as fast, and enough for training.
    torch.set_float32_matmul_precision("medium")
    with show_progress() as on_log:
        pipeline = train_builtin(builtin(), folder, on_log, resolve_device("auto"))
    if as_json:
        _print_result(pipeline, folder / "training.json", f"--model {pipeline}")
    else:
        say(f"{pipeline}: done. Try: nabla generate --model {pipeline} --prompt ...")


def _print_result(result: Path, record: Path, use: str) -> None:
    from nabla_attn.files import read_json

    numbers = read_json(record)["numbers"]
    print_json({"result": str(result), "use": use, "record": str(record), "numbers": numbers})
