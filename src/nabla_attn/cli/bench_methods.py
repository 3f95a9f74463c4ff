"""`nabla bench methods`, `matrix` and `judged`: sparse attention methods beside each other.

Every command goes on where its records end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nabla_attn.cli import options as opt
from nabla_attn.cli import output as out

if TYPE_CHECKING:
    from nabla_attn.evaluation.calls import CallSource
    from nabla_attn.generation.request import GenerationRequest

SYNTHETIC = "synthetic"
# Its usual multiple of 8 blocks would be coarse on few blocks.
RULES = ("topk", "nabla", "sol", "subblock-multiple=1")
ORDERS = ("", "_order-raster", "_order-morton", "_order-hilbert", "_order-gilbert")
TAILS = ("", "_tail-mean", "_tail-first")
JUDGED = ("topk", "nabla", "sol", "pisa", "xattn", "sta")
JUDGED_DENSITIES = (0.05, 0.1, 0.2)
RESULTS = Path("benchmarks/results")

Method = Annotated[
    list[str] | None,
    typer.Option(
        help="A method, also with numbers: svg2-queries=24-keys=72; repeat. Default: all."
    ),
]
Density = Annotated[
    list[float] | None, typer.Option(help="A density; repeat.", show_default="0.05 0.1 0.2 0.3")
]
NumPrompts = Annotated[int, typer.Option(min=1, help="Prompts or samples, a record each.")]


@dataclass(frozen=True)
class RunOptions:
    """The videos of a study and the folder of its records."""

    model: opt.Model = "builtin"
    height: opt.Height = None
    width: opt.Width = None
    frames: Annotated[int, typer.Option(min=1, help="Frames of the videos.")] = 33
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of the videos.")] = 6
    output: Annotated[Path, typer.Option(help="Folder of the records.")] = RESULTS

    def load(self) -> Any:
        """The pipeline."""
        return opt.VideoOptions(model=self.model, dtype="float32").load()

    @property
    def request(self) -> "GenerationRequest":
        """The runs, in the model's own size and guidance where nothing else is asked for."""
        names = ("model", "height", "width", "frames", "steps")
        video = opt.VideoOptions(**{name: getattr(self, name) for name in names})
        return video.base_request(prompt="", seed=0)


@dataclass(frozen=True)
class CallOptions(RunOptions):
    """The calls that methods are measured on."""

    data: Annotated[
        str, typer.Option(help="Where q, k and v are from: model, or synthetic, a fixed large set.")
    ] = "model"
    prompts: opt.Prompts = None

    def folder(self, name: str) -> Path:
        """The folder of a study's records."""
        return self.output / (f"{name}_{SYNTHETIC}" if self.data == SYNTHETIC else name)

    def source(self, num_prompts: int) -> "CallSource":
        """Where the calls come from."""
        from nabla_attn.evaluation.model_calls import ModelCalls
        from nabla_attn.evaluation.prompts import take_prompts
        from nabla_attn.evaluation.synthetic import SyntheticCalls
        from nabla_attn.moving_shapes.judge import MovingShapesScorer
        from nabla_attn.moving_shapes.scene import describe, sample_scene

        if self.data == SYNTHETIC:
            return SyntheticCalls()
        if self.data != "model":
            raise ValueError(f"--data is model or {SYNTHETIC}: got {self.data!r}.")
        texts = take_prompts(self.prompts, num_prompts, MovingShapesScorer())
        if len(texts) < num_prompts:
            raise ValueError(
                f"{self.prompts} has {len(texts)} prompts: got --num-prompts {num_prompts}."
            )
        # One that is not measured, whatever the number of prompts.
        calibrates = describe(sample_scene(0))
        return ModelCalls(self.load(), self.request, texts, table_prompt=calibrates)


@opt.with_options(CallOptions, "calls")
def methods(
    calls: CallOptions,
    method: Method = None,
    density: Density = None,
    suffix: Annotated[
        list[str] | None,
        typer.Option(
            help="What stands behind methods, such as _tail-first; repeat.", show_default="none"
        ),
    ] = None,
    num_prompts: NumPrompts = 16,
) -> None:
    """Measure mass, error and seconds of methods at equal densities.

    Methods that need a table are measured where they are named, after a calibration each.
    """
    options = {"names": method, "suffixes": suffix or ("",)}
    _measure(calls, "methods", num_prompts, density, options)


@opt.with_options(CallOptions, "calls")
def matrix(
    calls: CallOptions,
    method: Annotated[
        list[str] | None, typer.Option(help="A rule; repeat.", show_default=" ".join(RULES))
    ] = None,
    density: Annotated[
        list[float] | None, typer.Option(help="A density; repeat.", show_default="0.1 0.2")
    ] = None,
    num_prompts: NumPrompts = 8,
) -> None:
    """Measure every rule in every order of tokens with every tail: what is each part worth?"""
    suffixes = [f"{order}{tail}" for order in ORDERS for tail in TAILS]
    options = {"names": method or RULES, "suffixes": suffixes}
    _measure(calls, "matrix", num_prompts, density or (0.1, 0.2), options)


@opt.with_options(RunOptions, "run")
def judged(
    run: RunOptions,
    method: Annotated[
        list[str] | None, typer.Option(help="A method; repeat.", show_default=" ".join(JUDGED))
    ] = None,
    density: Annotated[
        list[float] | None, typer.Option(help="A density; repeat.", show_default="0.05 0.1 0.2")
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts.")] = 32,
    videos: Annotated[Path, typer.Option(help="Folder of the videos.")] = Path("out/judged"),
) -> None:
    """Make and judge videos of methods at the settings that `nabla bench methods` found."""
    from nabla_attn.cli.progress import generation_bars
    from nabla_attn.evaluation.judged import judge_methods, read_algorithms
    from nabla_attn.moving_shapes.judge import MovingShapesScorer

    settings = run.output / "methods" / "settings.json"
    chosen = read_algorithms(settings, method or JUDGED, density or JUDGED_DENSITIES)
    scorer = MovingShapesScorer()
    with generation_bars(in_logs=True) as start:
        record = judge_methods(
            run.load(),
            run.request,
            [algorithm for mine in chosen.values() for algorithm in mine],
            scorer.prompts(num_prompts),
            scorer,
            videos=videos,
            record=run.output / "judged.json",
            fps=opt.VideoOptions(model=run.model).rate,
            on_video=lambda label, done, total: start(f"{done + 1}/{total} {label}"),
            on_failed=lambda item, reason: out.notice("failed", f"{item}: {reason}"),
        )
    count = len(record.numbers["algorithms"]["dense"])
    typer.echo(f"{count} prompts that all algorithms have; record: {run.output / 'judged.json'}")


def _measure(
    calls: CallOptions,
    study: str,
    num_prompts: int,
    densities: Sequence[float] | None,
    options: dict[str, Any],
) -> None:
    """Measure and print a table."""
    from nabla_attn.cli.progress import count_bar
    from nabla_attn.evaluation.leaderboard import DENSITIES, Leaderboard, rows_of
    from nabla_attn.evaluation.synthetic import SyntheticCalls, record_locality

    source, folder = calls.source(num_prompts), calls.folder(study)
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
