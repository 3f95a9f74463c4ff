"""`nabla train`: run a recipe, or continue one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nabla_attn.cli.loading import quiet_libraries
from nabla_attn.cli.options import AsJson
from nabla_attn.cli.output import print_json, say

if TYPE_CHECKING:
    from nabla_attn.training.config import TrainConfig


def train(
    recipe: Annotated[str, typer.Argument(help="builtin, pretrain, finetune or distill.")] = "",
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as optim.lr=1e-5.")
    ] = None,
    recipe_name: Annotated[str, typer.Option("--recipe", help="The recipe, as an option.")] = "",
    config: Annotated[Path | None, typer.Option(help="YAML file with overrides.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="The run folder.", show_default="runs/<recipe>")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Look at everything, train nothing.")
    ] = False,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Resume with another configuration.")
    ] = False,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 takes torch's own choice.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Train a model. Without a recipe, list the recipes.

    Ctrl-C is safe: a run can continue where it stopped.
    """
    values = list(overrides or [])
    if "=" in recipe:
        recipe, values = "", [recipe, *values]
    if recipe and recipe_name and recipe != recipe_name:
        raise ValueError(f"two recipes given: {recipe} and {recipe_name}. Give one.")
    if threads < 0:
        raise ValueError(f"threads must be 0 or more, got {threads}.")
    from nabla_attn.training.recipes import OVERVIEW, read_config

    name = recipe or recipe_name
    folder = output or Path("runs") / name
    if not name:
        if values or config or output or resume or check:
            raise ValueError("no recipe given: name pretrain, finetune, distill or builtin first.")
        typer.echo(OVERVIEW, nl=False)
    elif name == "builtin":
        if values or config or check:
            raise ValueError(
                "the builtin recipe takes no overrides and no --check. Use pretrain, finetune or "
                "distill with model=builtin."
            )
        _set_threads(threads)
        _train_builtin(folder, as_json=as_json)
    else:
        wanted = read_config(name, values, config)
        _set_threads(threads)
        if check:
            _check(wanted, folder, as_json=as_json)
        else:
            _train(wanted, folder, resume, allow_changes, as_json=as_json)


def _train(
    config: "TrainConfig", folder: Path, resume: bool, allow_changes: bool, *, as_json: bool
) -> None:
    from nabla_attn.cli.progress import show_progress, show_start
    from nabla_attn.distributed import is_first_process
    from nabla_attn.moving_shapes.dataset import MovingShapes
    from nabla_attn.training.job import describe_use, has_checkpoint, run_job

    quiet_libraries()
    try:
        with show_progress() as on_log:
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


def _check(config: "TrainConfig", folder: Path, *, as_json: bool) -> None:
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


def _train_builtin(folder: Path, *, as_json: bool) -> None:
    import torch

    from nabla_attn.cli.progress import show_progress
    from nabla_attn.moving_shapes.recipe import builtin
    from nabla_attn.moving_shapes.train import train_builtin

    # Products in bfloat16 where the processor has them: twice as fast, and enough for training.
    torch.set_float32_matmul_precision("medium")
    with show_progress() as on_log:
        pipeline = train_builtin(builtin(), folder, on_log)
    if as_json:
        _print_result(pipeline, folder / "training.json", f"--model {pipeline}")
    else:
        say(f"{pipeline}: done. Try: nabla generate --model {pipeline} --prompt ...")


def _print_result(result: Path, record: Path, use: str) -> None:
    from nabla_attn.files import read_json

    numbers = read_json(record)["numbers"]
    print_json({"result": str(result), "use": use, "record": str(record), "numbers": numbers})


def _set_threads(threads: int) -> None:
    if threads:
        import torch

        torch.set_num_threads(threads)
