"""`nabla train`: run a recipe, or continue one."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from nabla_attn.training.config import TrainConfig

RECIPES = """\
recipes:
  pretrain   pretraining with sparse attention
  finetune   your own videos, with the attention that will be used
  distill    sparse attention learns what the dense model predicts
  builtin    the built-in model from nothing, about three hours

examples:
  nabla train distill --check                    look at everything, train nothing
  nabla train distill steps=200 lora.rank=16     the built-in model on its own world
  nabla train finetune model=MODEL_DIR data.folder=encoded/ lora.rank=16 precision=bfloat16
  nabla train finetune ... --resume              the same command continues where it stopped

Clips for other models are encoded once: nabla encode VIDEOS --model MODEL_DIR --output encoded/
"""


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
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object.")
    ] = False,
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
    name = recipe or recipe_name
    if not name:
        if values or config or output or resume or check:
            raise ValueError(
                "no recipe given. Name one first: pretrain, finetune, distill or builtin."
            )
        typer.echo(RECIPES, nl=False)
        return
    _set_threads(threads)
    folder = output or Path("runs") / name
    if name == "builtin":
        if values or config or check:
            raise ValueError(
                "the builtin recipe takes no overrides and no --check. Use pretrain, finetune or "
                "distill with model=builtin."
            )
        _train_builtin(folder, quiet=quiet, as_json=as_json)
        return
    from nabla_attn.cli.options import quiet_libraries
    from nabla_attn.moving_shapes.dataset import MovingShapes
    from nabla_attn.training.job import check_job
    from nabla_attn.training.recipes import read_config

    wanted = read_config(name, values, config)
    quiet_libraries()
    if check:
        _show(check_job(wanted, folder, MovingShapes()), as_json=as_json)
        return
    options = {"resume": resume, "allow_changes": allow_changes}
    _train_model(wanted, folder, options, quiet=quiet, as_json=as_json)


def _train_model(
    config: "TrainConfig", folder: Path, options: dict[str, bool], *, quiet: bool, as_json: bool
) -> None:
    from nabla_attn.cli.train_progress import show_progress, show_start
    from nabla_attn.distributed import is_first_process
    from nabla_attn.moving_shapes.dataset import MovingShapes
    from nabla_attn.training.checkpoint import Checkpoints
    from nabla_attn.training.job import describe_use, run_job

    is_shown = is_first_process() and not quiet
    try:
        with show_progress(is_shown) as on_log:
            result = run_job(
                config,
                folder,
                MovingShapes(),
                on_start=show_start(config) if is_shown else lambda stage, facts: None,
                on_log=on_log,
                **options,
            )
    except KeyboardInterrupt:
        places = [folder / name / "checkpoints" for name, _ in config.split()]
        if is_first_process() and any(Checkpoints(place).latest() for place in places):
            typer.echo(f"{folder}: saved. The same command with --resume continues.", err=True)
        raise
    if not is_first_process():
        return
    use = describe_use(config, result)
    if as_json:
        _print_result(result, use)
        return
    typer.echo(f"{result}: done. Use it: {use}.")
    if config.objective.is_guided:
        typer.echo("it predicts what guidance gave: use it with guidance 1, which is faster.")


def _train_builtin(folder: Path, *, quiet: bool, as_json: bool) -> None:
    import torch

    from nabla_attn.cli.train_progress import show_progress
    from nabla_attn.moving_shapes.recipe import builtin
    from nabla_attn.moving_shapes.train import train_builtin

    # Products in bfloat16 where the processor has them: twice as fast, and enough for training.
    torch.set_float32_matmul_precision("medium")
    with show_progress(not quiet) as on_log:
        pipeline = train_builtin(builtin(), folder, on_log)
    if as_json:
        _print_result(pipeline, f"--model {pipeline}", folder / "training.json")
        return
    typer.echo(f"{pipeline}: done. Try: nabla generate --model {pipeline} --prompt ...")


def _print_result(result: Path, use: str, record: Path | None = None) -> None:
    from nabla_attn.files import read_json

    record = record or result.parent / "training.json"
    numbers = read_json(record)["numbers"]
    shown = {"result": str(result), "use": use, "record": str(record), "numbers": numbers}
    typer.echo(json.dumps(shown))


def _show(facts: dict[str, dict[str, Any]], *, as_json: bool) -> None:
    from nabla_attn.distributed import is_first_process

    if not is_first_process():
        return
    if as_json:
        typer.echo(json.dumps({"stages": facts}))
        return
    for stage, lines in facts.items():
        if len(facts) > 1:
            typer.echo(f"{stage}:")
        for name, text in lines.items():
            typer.echo(f"{name + ':':<11} {text}")
    typer.echo("nothing was trained or written.")


def _set_threads(threads: int) -> None:
    if threads:
        import torch

        torch.set_num_threads(threads)
