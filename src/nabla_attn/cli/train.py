"""``nabla train``: run a recipe, or go on with it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nabla_attn.training.loop import Progress


def train(
    recipe: Annotated[str, typer.Argument(help="The recipe; or pass it as --recipe.")] = "",
    recipe_name: Annotated[str, typer.Option("--recipe", help="The recipe.")] = "",
    output: Annotated[
        Path | None, typer.Option(help="The run folder.", show_default="runs/<recipe>")
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 takes torch's own choice.")] = 0,
) -> None:
    """Train a model. Ctrl-C is safe: the same command goes on where it stopped."""
    from nabla_attn.training.recipes import recipe as find_recipe

    if recipe and recipe_name and recipe != recipe_name:
        raise ValueError(f"two recipes given: {recipe} and {recipe_name}. Give one.")
    if threads < 0:
        raise ValueError(f"threads must be 0 or more, got {threads}.")
    name = recipe or recipe_name or "builtin"
    config = find_recipe(name)
    folder = output or Path("runs") / name
    from nabla_attn.training.builtin import train_builtin

    _prepare_torch(threads)
    with _stage_bars() as report:
        pipeline = train_builtin(config, folder, report)
    typer.echo(f"{pipeline}: done. Try: nabla generate --model {pipeline} --prompt ...")


def _prepare_torch(threads: int) -> None:
    import torch

    # Products in bfloat16 where the processor has them: twice as fast, and enough for training.
    torch.set_float32_matmul_precision("medium")
    if threads:
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
