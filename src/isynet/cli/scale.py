"""`isynet scale`: more blocks where they gain most a millisecond."""

from pathlib import Path
from typing import Annotated

import typer

from isynet.cli import options as opt
from isynet.cli.output import AsJson, Model, print_rows, progress_bar
from nabla_attn.cli.output import print_json, say


def scale(
    model: Model,
    latency_ms: Annotated[
        list[float], typer.Option(help="Milliseconds an image to scale to; again for more.")
    ],
    data: opt.Data = "fashion-scenes",
    size: opt.ImageSize = 32,
    added: Annotated[str, typer.Option(help="Blocks added to one stage at a time.")] = "1,3",
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each network.")] = 2,
    validation: Annotated[int, typer.Option(help="Images held out, which decide.")] = 4000,
    gains: Annotated[
        str, typer.Option(help="Gain of each stage instead of measuring: 0.2,1,0.5.")
    ] = "",
    steps: opt.Steps = 200,
    batch: opt.Batch = 96,
    warmup: opt.Warmup = None,
    learning_rate: opt.LearningRate = 2e-3,
    augment: opt.Augment = 0.0,
    runtime: opt.Runtime = "onnxruntime",
    measured: Annotated[
        bool, typer.Option("--measured", help="Also time the whole networks.")
    ] = False,
    seed: opt.Seed = 0,
    output: Annotated[Path, typer.Option(help="Folder of all records.")] = Path("out/scale"),
    as_json: AsJson = False,
) -> None:
    """Scale a network to latencies by adding blocks where they gain most a millisecond.

    Gains are measured by short trainings, milliseconds by a table of blocks; the choice is exact.
    The same command goes on where an earlier one was stopped.
    """
    from isynet.checkpoint import architecture_of
    from isynet.data.catalogue import open_source
    from isynet.growth import ScalePlan, check_gains, measure_gains, scale, scale_evenly

    architecture = architecture_of(model)
    plan = ScalePlan(tuple(int(n) for n in added.split(",")), seeds, validation)
    values = [float(part) for part in gains.split(",")] if gains else []
    if gains:
        check_gains(architecture, values)
    source = open_source(data, "train", size)
    table = opt.open_table(output, size, source.channels, len(source.classes), runtime)
    if table.factor is None:
        table.fit_factor([architecture])
    if not gains:
        with progress_bar("measuring gains") as on_progress:
            values = measure_gains(
                architecture,
                source,
                folder=output,
                recipe=opt.make_recipe(steps, batch, warmup, learning_rate, augment),
                plan=plan,
                seed=seed,
                on_progress=on_progress,
            )
    rows = []
    for grown in scale(architecture, values, table, [ms / 1e3 for ms in latency_ms]):
        even = scale_evenly(architecture, table, grown.budget)
        row = {
            "at most ms": grown.budget * 1e3,
            "architecture": str(grown.architecture),
            "predicted ms": grown.seconds * 1e3,
            "predicted gain": grown.gain,
            "evenly deepened": str(even),
        }
        if measured:
            row["measured ms"] = table.measure(grown.architecture) * 1e3
        rows.append(row)
    if as_json:
        print_json({"gains": values, "scaled": rows})
    else:
        say(f"gains a stage: {', '.join(f'{gain:.3g}' for gain in values)}")
        print_rows(rows, as_json=False)
