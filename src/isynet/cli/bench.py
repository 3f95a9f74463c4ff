"""`isynet bench`: studies that hold the package to its claims."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isynet.cli import options as opt
from isynet.cli.output import AsJson, Machine, Size, print_rows, progress_bar
from nabla_attn.cli.output import print_json, say

if TYPE_CHECKING:
    from isynet.architecture import Architecture

Ours = Annotated[list[str], typer.Argument(help="Our networks, or folders of searches.")]
Seeds = Annotated[int, typer.Option("--seeds", min=1, help="Trainings of each network.")]

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
    architectures: Ours,
    latency_ms: Annotated[float, typer.Option(help="Most milliseconds an image.")],
    data: opt.Data = "fashion-scenes",
    size: opt.ImageSize = 32,
    seeds: Seeds = 3,
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
    from isynet.comparison import study_peers
    from isynet.data.catalogue import open_source

    source, test = open_source(data, "train", size), open_source(data, "test", size)
    table = opt.open_table(output, size, source.channels, len(source.classes), runtime)
    with progress_bar("training") as on_progress:
        rows = study_peers(
            [_architecture(name) for name in architectures],
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
    shown = [
        {
            "network": row["network"],
            "ms": row["seconds"] * 1e3,
            "accuracy %": 100 * row["accuracy"],
            "ahead of the best other": _lead(row.get("ahead"), row.get("ahead_error")),
        }
        for row in rows
    ]
    print_rows(shown, as_json=False)


@bench.command()
def scaling(
    architecture: Annotated[str, typer.Argument(help="Our network, or the folder of a search.")],
    gains: Annotated[
        str, typer.Option(help="Gain of each stage, as `isynet scale` prints them: 0.2,1,0.5.")
    ],
    latency_ms: Annotated[
        list[float], typer.Option(help="Milliseconds an image to scale to; again for more.")
    ],
    data: opt.Data = "fashion-scenes",
    size: opt.ImageSize = 32,
    seeds: Seeds = 3,
    steps: opt.Steps = 1000,
    batch: opt.Batch = 96,
    warmup: opt.Warmup = None,
    learning_rate: opt.LearningRate = 2e-3,
    augment: opt.Augment = 0.0,
    runtime: opt.Runtime = "onnxruntime",
    output: Annotated[Path, typer.Option(help="Folder of the records.")] = Path(
        "out/bench-scaling"
    ),
    as_json: AsJson = False,
) -> None:
    """Train a network scaled by its gains beside the same network deepened evenly.

    The same command goes on where an earlier one was stopped.
    """
    from isynet.comparison import study_scaling
    from isynet.data.catalogue import open_source
    from isynet.growth import scale

    base, values = _architecture(architecture), [float(part) for part in gains.split(",")]
    source, test = open_source(data, "train", size), open_source(data, "test", size)
    table = opt.open_table(output, size, source.channels, len(source.classes), runtime)
    if table.factor is None:
        table.fit_factor([base])
    with progress_bar("training") as on_progress:
        rows = study_scaling(
            base,
            scale(base, values, table, [ms / 1e3 for ms in latency_ms]),
            source,
            test,
            table,
            folder=output,
            recipe=opt.make_recipe(steps, batch, warmup, learning_rate, augment),
            seeds=seeds,
            on_progress=on_progress,
        )
    if as_json:
        print_json({"rows": rows})
        return
    shown = [
        {
            "at most ms": row["budget"] * 1e3,
            "network": row[kind]["architecture"],
            "predicted ms": row[kind]["predicted"] * 1e3,
            "measured ms": row[kind]["measured"] * 1e3,
            "accuracy %": 100 * row[kind]["accuracy"],
            "ahead": _lead(row["ahead"], row["ahead_error"]) if kind == "scaled" else None,
        }
        for row in rows
        for kind in ("scaled", "even")
    ]
    print_rows(shown, as_json=False)


@bench.command()
def downstream(
    architectures: Ours,
    latency_ms: Annotated[float, typer.Option(help="Most milliseconds an image.")],
    peers: Annotated[
        list[str] | None,
        typer.Option("--peer", help="Family of others; again for more.", show_default="all"),
    ] = None,
    data: opt.Data = "fashion-scenes",
    size: opt.ImageSize = 32,
    few: Annotated[str, typer.Option(help="Data set to fine-tune on.")] = "digits",
    shots: Annotated[int, typer.Option(min=1, help="Its images of each class.")] = 10,
    objects: Annotated[str, typer.Option(help="Data set with boxes.")] = "fashion-scenes",
    objects_size: Annotated[int, typer.Option(min=8, help="Pixels of its images' sides.")] = 64,
    seeds: Seeds = 3,
    steps: opt.Steps = 1000,
    few_steps: Annotated[int, typer.Option(min=1, help="Steps of the fine-tuning.")] = 100,
    objects_steps: Annotated[int, typer.Option(min=1, help="Steps of the detector.")] = 600,
    test_images: Annotated[int, typer.Option(min=1, help="Images with boxes to test on.")] = 1000,
    batch: opt.Batch = 96,
    learning_rate: opt.LearningRate = 2e-3,
    runtime: opt.Runtime = "onnxruntime",
    output: Annotated[Path, typer.Option(help="Folder of the records.")] = Path(
        "out/bench-downstream"
    ),
    as_json: AsJson = False,
) -> None:
    """Compare networks of equal latency at classes, few images of another kind, and boxes.

    The same command goes on where an earlier one was stopped.
    """
    from isynet.data.catalogue import open_objects, open_source
    from isynet.downstream import DownstreamData, DownstreamPlan, study_downstream

    source = open_source(data, "train", size)
    sets = DownstreamData(
        source,
        open_source(data, "test", size),
        open_source(few, "train", size, grey_channels=source.channels),
        open_source(few, "test", size, grey_channels=source.channels),
        open_objects(objects, "train", objects_size),
        open_objects(objects, "test", objects_size),
    )
    table = opt.open_table(output, size, source.channels, len(source.classes), runtime)
    with progress_bar("training") as on_progress:
        rows = study_downstream(
            [_architecture(name) for name in architectures],
            sets,
            table,
            latency=latency_ms / 1e3,
            families=peers or (),
            folder=output,
            plan=DownstreamPlan(
                opt.make_recipe(steps, batch, None, learning_rate, 0.0),
                opt.make_recipe(few_steps, min(batch, 32), None, learning_rate / 2, 0.0),
                opt.make_recipe(objects_steps, min(batch, 32), None, learning_rate / 2, 0.0),
                shots,
                test_images,
                seeds,
            ),
            on_progress=on_progress,
        )
    if as_json:
        print_json({"rows": rows})
        return
    shown: list[dict[str, Any]] = []
    for row in rows:
        shown.append({"network": row["network"], "ms": row["seconds"] * 1e3})
        for name in ("accuracy", "transfer", "ap50"):
            ahead = row.get("ahead", {}).get(name, {})
            lead = _lead(ahead.get("mean"), ahead.get("error"))
            shown[-1] |= {f"{name} %": 100 * row[name], f"{name} ahead": lead}
    print_rows(shown, as_json=False)


def _architecture(name: str) -> "Architecture":
    from isynet.checkpoint import architecture_of
    from isynet.runs import load_best

    return load_best(name) if Path(name).is_dir() else architecture_of(name)


def _lead(mean: float | None, error: float | None) -> str | None:
    return None if mean is None or error is None else f"{100 * mean:+.2f} ± {100 * error:.2f}"
