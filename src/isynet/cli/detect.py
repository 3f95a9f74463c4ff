"""`isynet detect`: boxes around objects."""

from pathlib import Path
from typing import Annotated

import typer

from isynet.cli import options as opt
from isynet.cli.output import AsJson, progress_bar
from nabla_attn.cli.output import print_json, say


def detect(
    model: Annotated[
        str, typer.Option(help="A network, an architecture, weights, or the folder of a search.")
    ] = "isynet-n0",
    data: Annotated[str, typer.Option(help="fashion-scenes or shapes.")] = "fashion-scenes",
    size: opt.ImageSize = 64,
    steps: opt.Steps = 1000,
    batch: opt.Batch = 32,
    warmup: opt.Warmup = None,
    learning_rate: opt.LearningRate = 1e-3,
    test_images: Annotated[int, typer.Option(min=1, help="Images of the test.")] = 1000,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: opt.Seed = 0,
    output: Annotated[
        Path, typer.Option(help="Folder of weights, state, record and pictures.")
    ] = Path("out/detect"),
    as_json: AsJson = False,
) -> None:
    """Train a detector on a network: a pyramid of three maps and an anchor-free head.

    The same command goes on where an earlier one was stopped, to the bit.
    """
    from isynet.detection.train import detect_in_folder

    with progress_bar("training") as on_progress:
        numbers = detect_in_folder(
            model,
            data,
            size=size,
            recipe=opt.make_recipe(steps, batch, warmup, learning_rate, 0.0),
            folder=output,
            seed=seed,
            test_images=test_images,
            device=device,
            on_progress=on_progress,
        )
    if as_json:
        print_json(numbers)
        return
    say(f"AP {numbers['ap']:.3f}, AP50 {numbers['ap50']:.3f}, AP75 {numbers['ap75']:.3f}")
    say(str(output / "detections.png"))
