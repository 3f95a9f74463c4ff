"""`nabla train`: run a recipe, or continue one."""

from pathlib import Path
from typing import Annotated

import typer

from nabla_attn.cli.options import AsJson, Force
from nabla_attn.cli.train_runs import check_training, run_builtin, run_training


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
    force: Force = False,
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
        run_builtin(folder, as_json=as_json)
    else:
        wanted = read_config(name, values, config)
        _set_threads(threads)
        if check:
            check_training(wanted, folder, as_json=as_json)
        else:
            run_training(wanted, folder, resume, allow_changes, is_forced=force, as_json=as_json)


def _set_threads(threads: int) -> None:
    if threads:
        import torch

        torch.set_num_threads(threads)
