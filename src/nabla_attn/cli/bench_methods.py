"""`nabla bench methods`, `matrix` and `judged`: sparse attention methods beside each other.

Every command goes on where its records end.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nabla_attn.cli import options as opt
from nabla_attn.cli import output as out

if TYPE_CHECKING:
    from nabla_attn.evaluation.calls import CallSource
    from nabla_attn.generation.request import GenerationRequest

SYNTHETIC = "synthetic"
RULES = ("topk", "nabla", "sol", "subblock")
ORDERS = ("", "_order-raster", "_order-morton", "_order-hilbert", "_order-gilbert")
TAILS = ("", "_tail-mean", "_tail-first")
JUDGED = ("topk", "nabla", "sol", "pisa", "xattn", "sta")
JUDGED_DENSITIES = (0.05, 0.1, 0.2)
RESULTS = Path("benchmarks/results")

Method = Annotated[list[str] | None, typer.Option(help="A method; repeat. Default: all.")]
Density = Annotated[
    list[float] | None, typer.Option(help="A density; repeat.", show_default="0.05 0.1 0.2 0.3")
]
NumPrompts = Annotated[int, typer.Option(min=1, help="Prompts or samples, a record each.")]
Data = Annotated[
    str, typer.Option(help="Where q, k and v are from: model, or synthetic, a fixed large set.")
]
Frames = Annotated[int, typer.Option(min=1, help="Frames of the videos.")]
Steps = Annotated[int, typer.Option(min=1, help="Denoising steps of the videos.")]
Output = Annotated[Path, typer.Option(help="Folder of the records.")]


def methods(
    method: Method = None,
    density: Density = None,
    suffix: Annotated[
        list[str] | None,
        typer.Option(
            help="What stands behind methods, such as _tail-first; repeat.", show_default="none"
        ),
    ] = None,
    num_prompts: NumPrompts = 16,
    data: Data = "model",
    model: opt.Model = "builtin",
    prompts: opt.Prompts = None,
    height: opt.Height = None,
    width: opt.Width = None,
    frames: Frames = 33,
    steps: Steps = 6,
    output: Output = RESULTS,
) -> None:
    """Measure mass, error and seconds of methods at equal densities.

    Methods that need a table are measured where they are named, after a calibration each.
    """
    request = _request(model, height, width, frames, steps)
    source = _source(data, model, request, prompts, num_prompts)
    folder = output / ("methods_synthetic" if data == SYNTHETIC else "methods")
    options = {"names": method, "suffixes": suffix or ("",)}
    _measure(source, folder, num_prompts, density, options)


def matrix(
    method: Annotated[
        list[str] | None, typer.Option(help="A rule; repeat.", show_default=" ".join(RULES))
    ] = None,
    density: Annotated[
        list[float] | None, typer.Option(help="A density; repeat.", show_default="0.1 0.2")
    ] = None,
    num_prompts: NumPrompts = 8,
    data: Data = "model",
    model: opt.Model = "builtin",
    prompts: opt.Prompts = None,
    height: opt.Height = None,
    width: opt.Width = None,
    frames: Frames = 33,
    steps: Steps = 6,
    output: Output = RESULTS,
) -> None:
    """Measure every rule in every order of tokens with every tail: what is each part worth?"""
    request = _request(model, height, width, frames, steps)
    source = _source(data, model, request, prompts, num_prompts)
    folder = output / ("matrix_synthetic" if data == SYNTHETIC else "matrix")
    suffixes = [f"{order}{tail}" for order in ORDERS for tail in TAILS]
    options = {"names": method or RULES, "suffixes": suffixes}
    _measure(source, folder, num_prompts, density or (0.1, 0.2), options)


def judged(
    method: Annotated[
        list[str] | None, typer.Option(help="A method; repeat.", show_default=" ".join(JUDGED))
    ] = None,
    density: Annotated[
        list[float] | None, typer.Option(help="A density; repeat.", show_default="0.05 0.1 0.2")
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts.")] = 32,
    model: opt.Model = "builtin",
    height: opt.Height = None,
    width: opt.Width = None,
    frames: Frames = 33,
    steps: Steps = 6,
    videos: Annotated[Path, typer.Option(help="Folder of the videos.")] = Path("out/judged"),
    output: Output = RESULTS,
) -> None:
    """Make and judge videos of methods at the settings that `nabla bench methods` found."""
    from nabla_attn.cli.progress import generation_bars
    from nabla_attn.evaluation.judged import judge_methods, read_algorithms
    from nabla_attn.moving_shapes.judge import MovingShapesScorer

    settings = output / "methods" / "settings.json"
    chosen = read_algorithms(settings, method or JUDGED, density or JUDGED_DENSITIES)
    video = opt.VideoOptions(model=model, dtype="float32")
    scorer = MovingShapesScorer()
    with generation_bars(in_logs=True) as start:
        record = judge_methods(
            video.load(),
            _request(model, height, width, frames, steps),
            [algorithm for mine in chosen.values() for algorithm in mine],
            scorer.prompts(num_prompts),
            scorer,
            videos=videos,
            record=output / "judged.json",
            fps=video.rate,
            on_video=lambda label, done, total: start(f"{done + 1}/{total} {label}"),
            on_failed=lambda item, reason: out.notice("failed", f"{item}: {reason}"),
        )
    count = len(record.numbers["algorithms"]["dense"])
    typer.echo(f"{count} prompts that all algorithms have; record: {output / 'judged.json'}")


def _request(
    model: str, height: int | None, width: int | None, frames: int, steps: int
) -> "GenerationRequest":
    """The runs, in the model's own size and guidance where nothing else is asked for."""
    video = opt.VideoOptions(model=model, height=height, width=width, frames=frames, steps=steps)
    return video.base_request(prompt="", seed=0)


def _source(
    data: str, model: str, request: "GenerationRequest", prompts: Path | None, num_prompts: int
) -> "CallSource":
    """Where the calls come from."""
    from nabla_attn.evaluation.calls import ModelCalls
    from nabla_attn.evaluation.prompts import take_prompts
    from nabla_attn.evaluation.synthetic import SyntheticCalls
    from nabla_attn.moving_shapes.judge import MovingShapesScorer
    from nabla_attn.moving_shapes.scene import describe, sample_scene

    if data == SYNTHETIC:
        return SyntheticCalls()
    if data != "model":
        raise ValueError(f"--data is model or {SYNTHETIC}: got {data!r}.")
    texts = take_prompts(prompts, num_prompts, MovingShapesScorer())
    if len(texts) < num_prompts:
        raise ValueError(f"{prompts} has {len(texts)} prompts: got --num-prompts {num_prompts}.")
    pipeline = opt.VideoOptions(model=model, dtype="float32").load()
    # One that is not measured, whatever the number of prompts.
    calibrates = describe(sample_scene(0))
    return ModelCalls(pipeline, request, texts, table_prompt=calibrates)


def _measure(
    source: "CallSource",
    folder: Path,
    num_prompts: int,
    densities: Sequence[float] | None,
    options: dict[str, Any],
) -> None:
    """Measure and print a table."""
    from nabla_attn.cli.progress import count_bar
    from nabla_attn.evaluation.leaderboard import DENSITIES, Leaderboard, rows_of
    from nabla_attn.evaluation.synthetic import SyntheticCalls, record_locality

    if isinstance(source, SyntheticCalls):
        record_locality(source, folder / "locality.json")
    board = Leaderboard(source, folder, densities=densities or DENSITIES, **options)
    with count_bar("measuring", "methods") as show:
        records = board.measure(num_prompts, on_progress=show)
    header = ("algorithm", "pairs kept", "mass", "error", "ms")
    rows = [
        (
            row["algorithm"],
            f"{row['density']:.1%}",
            f"{row['recall']:.3f}",
            f"{row['error']:.4f}",
            f"{row['seconds'] * 1e3:.1f}",
        )
        for row in sorted(rows_of(records), key=lambda row: row["density"])
    ]
    out.print_table(header, rows)
    typer.echo(f"records: {folder}")
