"""`isynet train`: a classifier by the published recipe."""

from pathlib import Path
from typing import Annotated

import typer

from isynet.cli import options as opt
from isynet.cli.output import AsJson, progress_bar
from nabla_attn.cli.output import print_json, say


def train(
    model: Annotated[
        str, typer.Option(help="A network, an architecture, a file, or the folder of a search.")
    ] = "isynet-n0",
    weights: Annotated[
        Path | None,
        typer.Option("--from", help="A .safetensors file to fine-tune, in place of --model."),
    ] = None,
    data: opt.Data = "fashion-scenes",
    size: opt.ImageSize = 32,
    steps: opt.Steps = 1000,
    batch: opt.Batch = 128,
    warmup: opt.Warmup = None,
    learning_rate: opt.LearningRate = 1e-3,
    augment: opt.Augment = 9.0,
    peer: Annotated[
        str, typer.Option(help="Second network to learn with; published: isynet-n3-s2.")
    ] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: opt.Seed = 0,
    output: Annotated[Path, typer.Option(help="Folder of weights, state and record.")] = Path(
        "out/train"
    ),
    as_json: AsJson = False,
) -> None:
    """Train a network and test it, from random weights or with --from from those of a file.

    The same command goes on where an earlier one was stopped, to the bit.
    """
    from isynet.training.run import train_in_folder

    if weights is not None and weights.suffix != ".safetensors":
        raise ValueError(
            f"--from takes a .safetensors file, got {weights}. Pass others as --model."
        )
    with progress_bar("training") as on_progress:
        numbers = train_in_folder(
            str(weights or model),
            data,
            size=size,
            recipe=opt.make_recipe(steps, batch, warmup, learning_rate, augment, peer),
            seed=seed,
            folder=output,
            device=device,
            on_progress=on_progress,
        )
    if as_json:
        print_json(numbers)
    else:
        say(f"accuracy {numbers['accuracy']:.2%} on {numbers['test_images']} test images")
        say(str(output / "weights.safetensors"))
