"""``nabla train``: run a recipe, or go on with it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nabla_attn.moving_shapes.loop import Progress


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
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Look at everything, train nothing.")
    ] = False,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Resume with another configuration.")
    ] = False,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 takes torch's own choice.")] = 0,
) -> None:
    """Train a model. Ctrl-C is safe: the run can go on where it stopped."""
    values = list(overrides or [])
    if "=" in recipe:
        recipe, values = "", [recipe, *values]
    if recipe and recipe_name and recipe != recipe_name:
        raise ValueError(f"two recipes given: {recipe} and {recipe_name}. Give one.")
    if threads < 0:
        raise ValueError(f"threads must be 0 or more, got {threads}.")
    name = recipe or recipe_name or "builtin"
    folder = output or Path("runs") / name
    if name != "builtin":
        from nabla_attn.cli.train_model import train_model

        _set_threads(threads)
        train_model(
            name,
            values,
            config,
            folder,
            resume=resume,
            check=check,
            allow_changes=allow_changes,
        )
        return
    if values or config or check:
        raise ValueError(
            "the builtin recipe takes no overrides and no --check. Use pretrain, finetune or "
            "distill with model=builtin."
        )
    _train_builtin(folder, threads)


def _train_builtin(folder: Path, threads: int) -> None:
    import torch

    from nabla_attn.moving_shapes.recipe import builtin
    from nabla_attn.moving_shapes.train import train_builtin

    # Products in bfloat16 where the processor has them: twice as fast, and enough for training.
    torch.set_float32_matmul_precision("medium")
    _set_threads(threads)
    with _stage_bars() as report:
        pipeline = train_builtin(builtin(), folder, report)
    typer.echo(f"{pipeline}: done. Try: nabla generate --model {pipeline} --prompt ...")


def _set_threads(threads: int) -> None:
    if threads:
        import torch

        torch.set_num_threads(threads)


@contextmanager
def _stage_bars() -> Iterator[Callable[["Progress"], None]]:
    """Yield a callback that shows one bar for every stage: steps, loss, time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks = {}

        def show(progress: "Progress") -> None:
            if progress.stage not in tasks:
                tasks[progress.stage] = bars.add_task(progress.stage, total=progress.steps, loss="")
            loss = f"loss {progress.loss:.4f}" if progress.loss else ""
            bars.update(tasks[progress.stage], completed=progress.step, loss=loss)

        yield show
