"""Options of the verbs that train: data, recipe and latency."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pathlib import Path

    from isynet.latency import LatencyTable
    from isynet.training.recipe import Recipe

Data = Annotated[
    str,
    typer.Option(
        help="fashion, fashion-scenes, digits, shapes, or a folder: idx files, or train and val."
    ),
]
ImageSize = Annotated[int, typer.Option("--size", min=1, help="Pixels of the images' sides.")]
Steps = Annotated[int, typer.Option(min=1, help="Optimizer steps of a training.")]
Batch = Annotated[int, typer.Option(min=2, help="Images of a step.")]
Warmup = Annotated[
    int | None, typer.Option(min=0, help="Steps of warm-up.", show_default="7 % of the steps")
]
LearningRate = Annotated[float, typer.Option(help="Top learning rate.")]
Augment = Annotated[float, typer.Option(help="Magnitude of random augmentation, 0 to 10.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of all that is random.")]
Runtime = Annotated[str, typer.Option(help="What latency is measured with: onnxruntime or torch.")]


def make_recipe(
    steps: int, batch: int, warmup: int | None, learning_rate: float, augment: float, peer: str = ""
) -> "Recipe":
    """The recipe of the options; what they leave open is as published."""
    from isynet.training.recipe import Recipe

    return Recipe(
        steps=steps,
        batch=batch,
        # 40 of 550 epochs, as published.
        warmup=min(steps - 1, round(steps * 40 / 550)) if warmup is None else warmup,
        learning_rate=learning_rate,
        augment=augment,
        clip_norm=5.0,
        peer=peer,
    )


def open_table(
    folder: "Path", size: int, in_chans: int, num_classes: int, runtime: str
) -> "LatencyTable":
    """The table of latencies that is kept in a folder."""
    from isynet.latency import Conditions, LatencyTable

    conditions = Conditions(size, in_chans=in_chans, num_classes=num_classes, runtime=runtime)
    return LatencyTable(conditions, path=folder / "latency.json")
