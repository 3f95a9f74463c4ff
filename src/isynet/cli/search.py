"""`isynet search`: a network for a latency."""

from pathlib import Path
from random import Random
from typing import Annotated

import typer

from isynet.cli import options as opt
from isynet.cli.output import AsJson, print_rows, progress_bar
from nabla_attn.cli.output import print_json, say


def search(
    latency_ms: Annotated[
        float, typer.Option(help="Most milliseconds an image, on one thread in batches of 16.")
    ],
    data: opt.Data = "fashion-scenes",
    size: opt.ImageSize = 32,
    least: Annotated[
        float, typer.Option(min=0, max=1, help="Least latency, as a share of the most.")
    ] = 0.85,
    stages: Annotated[str, typer.Option(help="Numbers of stages.")] = "3,4",
    edges: Annotated[
        str, typer.Option(help="Edges of a block: 1 3 5 7, 3s 5s 7s, 3d 5d 7d.")
    ] = "1,3,5,3s,5s",
    heads: Annotated[str, typer.Option(help="Widths of the head; 0 is none.")] = "0,256,1280",
    population: Annotated[int, typer.Option(help="Networks of a generation.")] = 16,
    generations: Annotated[int, typer.Option(help="Number of generations.")] = 4,
    rungs: Annotated[int, typer.Option(help="Training lengths, each for a quarter.")] = 2,
    validation: Annotated[int, typer.Option(help="Images held out, which decide.")] = 4000,
    steps: opt.Steps = 100,
    batch: opt.Batch = 96,
    warmup: opt.Warmup = None,
    learning_rate: opt.LearningRate = 2e-3,
    augment: opt.Augment = 0.0,
    runtime: opt.Runtime = "onnxruntime",
    seed: opt.Seed = 0,
    output: Annotated[Path, typer.Option(help="Folder of all records.")] = Path("out/search"),
    as_json: AsJson = False,
) -> None:
    """Search for the network that learns best within a latency.

    The same command goes on where an earlier one was stopped, also by a kill, to the same result.
    """
    from isynet.data.catalogue import open_source
    from isynet.evolution import SearchPlan, search
    from isynet.latency import FACTOR_NETWORKS
    from isynet.pictures import draw_front
    from isynet.space import SearchSpace

    space = SearchSpace(
        stages=_numbers(stages), edges=tuple(edges.split(",")), heads=_numbers(heads)
    )
    source = open_source(data, "train", size)
    table = opt.open_table(output, size, source.channels, len(source.classes), runtime)
    if table.factor is None:
        rng = Random(seed)
        table.fit_factor([space.sample(rng) for _ in range(FACTOR_NETWORKS)])
    plan = SearchPlan(population, generations, rungs=rungs, validation=validation)
    with progress_bar("searching") as on_progress:
        found = search(
            space,
            source,
            table,
            latency=(least * latency_ms / 1e3, latency_ms / 1e3),
            folder=output,
            recipe=opt.make_recipe(steps, batch, warmup, learning_rate, augment),
            plan=plan,
            seed=seed,
            on_progress=on_progress,
        )
    draw_front(found.candidates, output / "front.png")
    rows = [
        {
            "architecture": str(each.architecture),
            "rung": each.rung,
            "accuracy %": 100 * each.accuracy,
            "predicted ms": each.seconds * 1e3,
        }
        for each in found.candidates
    ]
    if as_json:
        print_json({"best": str(found.best), "candidates": rows, "folder": str(output)})
        return
    print_rows(rows[:10], as_json=False)
    say(f"best: {found.best}")
    say(str(output / "front.png"))
    say(f"train it: isynet train --model {output} --data {data} --size {size}")


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"expected whole numbers such as 3,4: got {text!r}.") from None
