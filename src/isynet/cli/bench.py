"""`isynet bench`: studies that hold the package to its claims."""

from pathlib import Path
from typing import Annotated

import typer

from isynet.cli import options as opt
from isynet.cli.output import AsJson, Machine, Size, print_rows, progress_bar
from nabla_attn.cli.output import print_json, say

bench = typer.Typer(
    help="Hold the package to its claims: latency tables, MEM of spaces, networks of others.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


@bench.command()
def latency(
    size: opt.ImageSize = 32,
    count: Annotated[int, typer.Option(min=2, help="Networks that are predicted.")] = 30,
    runtime: opt.Runtime = "onnxruntime",
    seed: opt.Seed = 0,
    output: Annotated[Path, typer.Option(help="Folder of the records.")] = Path(
        "out/bench-latency"
    ),
    as_json: AsJson = False,
) -> None:
    """Predict networks from a table of blocks, then measure them."""
    from isynet.space import SearchSpace
    from isynet.studies import study_table

    table = opt.open_table(output, size, 3, 10, runtime)
    with progress_bar("measuring") as on_progress:
        result = study_table(
            SearchSpace(),
            table,
            folder=output,
            count=count,
            seed=seed,
            on_progress=on_progress,
        )
    if as_json:
        print_json(result)
        return
    print_rows(
        [
            {
                "architecture": row["architecture"],
                "predicted ms": row["predicted"] * 1e3,
                "measured ms": row["measured"] * 1e3,
            }
            for row in result["rows"]
        ],
        as_json=False,
    )
    say(
        f"error: median {result['median_error']:.1%}, largest {result['max_error']:.1%}; rank "
        f"correlation {result['spearman']:.3f}"
    )


@bench.command()
def space(
    size: Size = 224,
    samples: Annotated[int, typer.Option(min=2, help="Networks drawn from each space.")] = 60,
    stages: Annotated[int, typer.Option(min=1, help="Number of stages.")] = 5,
    machine: Machine = "",
    as_json: AsJson = False,
) -> None:
    """Print MEM of the search space and of its depthwise twin."""
    from isynet.space import SearchSpace
    from isynet.studies import study_spaces
    from nabla_attn.cost.rates import find_rates

    rates = find_rates(machine) if machine else None
    rows = study_spaces(SearchSpace((stages,)), size=size, samples=samples, rates=rates)
    print_rows(rows, as_json=as_json)


@bench.command()
def peers(
    architectures: Annotated[
        list[str], typer.Argument(help="Our networks, or folders of searches.")
    ],
    latency_ms: Annotated[float, typer.Option(help="Most milliseconds an image.")],
    data: opt.Data = "fashion-scenes",
    size: opt.ImageSize = 32,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each network.")] = 3,
    steps: opt.Steps = 1000,
    batch: opt.Batch = 96,
    warmup: opt.Warmup = None,
    learning_rate: opt.LearningRate = 2e-3,
    augment: opt.Augment = 0.0,
    runtime: opt.Runtime = "onnxruntime",
    output: Annotated[Path, typer.Option(help="Folder of the records.")] = Path("out/bench-peers"),
    as_json: AsJson = False,
) -> None:
    """Train networks beside those of others, adapted to the same measured latency.

    The same command goes on where an earlier one was stopped.
    """
    from isynet.checkpoint import architecture_of
    from isynet.data.catalogue import open_source
    from isynet.runs import load_best
    from isynet.studies import study_peers

    ours = [
        load_best(name) if Path(name).is_dir() else architecture_of(name) for name in architectures
    ]
    source, test = open_source(data, "train", size), open_source(data, "test", size)
    table = opt.open_table(output, size, source.channels, len(source.classes), runtime)
    with progress_bar("training") as on_progress:
        rows = study_peers(
            ours,
            source,
            test,
            table,
            latency=latency_ms / 1e3,
            folder=output,
            recipe=opt.make_recipe(steps, batch, warmup, learning_rate, augment),
            seeds=seeds,
            on_progress=on_progress,
        )
    if as_json:
        print_json({"rows": rows})
        return
    shown = []
    for row in rows:
        ahead = row.get("ahead")
        lead = None if ahead is None else f"{100 * ahead:+.2f} ± {100 * row['ahead_error']:.2f}"
        shown.append(
            {
                "network": row["network"],
                "ms": row["seconds"] * 1e3,
                "accuracy %": 100 * row["accuracy"],
                "ahead of the best other": lead,
            }
        )
    print_rows(shown, as_json=False)
