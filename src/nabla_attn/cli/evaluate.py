"""``nabla evaluate``: algorithms against dense attention on prompts x seeds."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from nabla_attn.cli import options as opt
from nabla_attn.cli.group import VerbCommand
from nabla_attn.cli.output import notice

if TYPE_CHECKING:
    from nabla_attn.progress import ProgressCallback


class RunByDefault(TyperGroup):
    """``nabla evaluate OPTIONS`` is ``nabla evaluate run OPTIONS``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the command in where options stand in its place."""
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


evaluate = typer.Typer(
    name="evaluate",
    cls=RunByDefault,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Measure algorithms against dense attention: `nabla evaluate --sparse-algo nabla-0.7`. "
    "Options: `nabla evaluate run --help`.",
)


@evaluate.command(cls=VerbCommand)
@opt.with_video_options
def run(
    video: opt.VideoOptions,
    sparse_algo: Annotated[
        list[str],
        typer.Option(help="An algorithm; repeat for more. nabla-* with --match finds its number."),
    ],
    prompts: opt.Prompts = None,
    num_prompts: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Prompts taken, from the first.",
            show_default="4 of the world's, all of a file's",
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, such as 0,1.")] = "0",
    output: Annotated[Path, typer.Option(help="Folder of the run; an interrupted one goes on.")] = (
        Path("out/evaluate")
    ),
    shard: Annotated[str, typer.Option(help="K/N: this process takes every N-th item.")] = "0/1",
    match: Annotated[
        str, typer.Option(help="density=0.3 or seconds=12: find the * of algorithms to reach it.")
    ] = "",
    num_probed: Annotated[
        int, typer.Option(min=0, help="Prompts whose attention is measured in an extra run.")
    ] = 2,
    lpips: Annotated[Path | None, typer.Option(help="Weights of lpips.LPIPS(net='alex').")] = None,
    clip: Annotated[Path | None, typer.Option(help="Directory of a CLIP model.")] = None,
    engine: opt.Engine = "locks",
    workers: opt.Workers = None,
) -> None:
    """Make the videos, measure them, and write records, a summary and curves."""
    from nabla_attn.cli.progress import generation_bars
    from nabla_attn.evaluation.prompts import make_items, take_prompts
    from nabla_attn.evaluation.run import (
        Evaluation,
        Measures,
        describe_weights,
        evaluate_items,
        list_algorithms,
        take_shard,
    )
    from nabla_attn.moving_shapes.scorer import MovingShapesScorer

    scorer = MovingShapesScorer()
    texts = take_prompts(prompts, num_prompts, scorer)
    items = make_items(texts, opt.read_indices(seeds) or ())
    request = video.base_request(prompt=texts[0], seed=items[0].seed)
    part = _read_shard(shard)
    if workers is not None and engine == "locks":
        raise ValueError("--workers is for --engine ray; start more processes instead.")
    rate = video.rate
    measures = Measures(
        scorer=scorer,
        lpips=_load_lpips(lpips),
        clip=_load_clip(clip),
        weights={
            name: describe_weights(path)
            for name, path in {"lpips": lpips, "clip": clip}.items()
            if path is not None
        },
        num_probed=num_probed,
    )
    pipeline = video.load() if match or engine == "locks" else None
    names = list_algorithms(_match(pipeline, request, sparse_algo, items, match))
    load = partial(_load_evaluation, video, request, output, rate, measures)
    with generation_bars(in_logs=True) as start:

        def on_video(label: str, done: int, total: int) -> "ProgressCallback":
            return start(f"{done + 1}/{total} {label}")

        if engine == "locks":
            evaluation = Evaluation(pipeline, request, output, fps=rate, measures=measures)
            shared = evaluation.run(names, items, shard=part, on_video=on_video)
        else:
            shared = evaluate_items(
                load,
                output,
                names,
                take_shard(items, part),
                measures,
                engine=engine,
                workers=workers,
                has_gpus=video.device != "cpu",
                on_item=lambda name, _: notice("note", name),
            )
    for name, reason in shared.failed.items():
        notice("failed", f"{name}: {reason}")
    if shared.elsewhere:
        notice("note", f"{len(shared.elsewhere)} items: other processes are at them.")
    if shared.failed and not shared.made and not shared.there:
        raise typer.Exit(1)
    _finish(output)
    if shared.failed:
        raise typer.Exit(1)


@evaluate.command(cls=VerbCommand)
def summary(run: Annotated[Path, typer.Argument(help="Folder of the run.")]) -> None:
    """Write and print the summary of a run again, such as after its last process."""
    _finish(run)


@evaluate.command(cls=VerbCommand)
def pack(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    output: Annotated[Path, typer.Argument(help="Where the packed run goes.")],
) -> None:
    """Write a run's records as one file an algorithm, to publish; `nabla report` reads them."""
    from nabla_attn.evaluation.pack import pack as pack_run

    typer.echo(f"{output}: {pack_run(run, output)} items that every algorithm has made.")


@evaluate.command("vbench-write", cls=VerbCommand)
def vbench_write(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    output: Annotated[Path, typer.Argument(help="Where the copies go.")],
) -> None:
    """Copy a run's videos under the names that VBench expects, and say how to score them."""
    from nabla_attn.evaluation.vbench import write_layout

    for algo, count in write_layout(run, output).items():
        typer.echo(
            f"{output / algo}: {count} videos. In VBench's own environment: vbench evaluate "
            f"--videos_path {output / algo} --output_path {output / algo}-results --dimension NAME"
        )


@evaluate.command("vbench-read", cls=VerbCommand)
def vbench_read(
    results: Annotated[Path, typer.Argument(help="Folder of *_eval_results.json files.")],
) -> None:
    """Recompute VBench's totals from its result files."""
    from nabla_attn.evaluation.vbench import compute_totals, read_results

    scores = read_results(results)
    for name, score in scores.items():
        typer.echo(f"{name:24s} {100 * score:6.2f}")
    for name, score in compute_totals(scores).items():
        typer.echo(f"{name:24s} {score:6.2f}")


def _load_evaluation(
    video: opt.VideoOptions, request: Any, output: Path, fps: float, measures: Any
) -> Any:
    """The evaluation with its pipeline on this process's own device."""
    from nabla_attn.evaluation.run import Evaluation

    pipeline = opt.load_on_own_device(video.model, video.device, video.dtype, video.lora or ())
    return Evaluation(pipeline, request, output, fps=fps, measures=measures)


def _match(pipeline: Any, request: Any, algos: list[str], items: Any, match: str) -> list[str]:
    from nabla_attn.config import parse
    from nabla_attn.evaluation.match import match_algorithm

    if any("*" in algo for algo in algos) != bool(match):
        raise ValueError(
            "--match and algorithms with a * belong together: --sparse-algo 'nabla-*' --match "
            "density=0.3."
        )
    for algo in algos:
        parse(algo.replace("*", "0.5"))
    by, _, target = match.partition("=")
    try:
        wanted = float(target) if match else 0.0
    except ValueError:
        raise ValueError(f"--match takes NAME=NUMBER such as density=0.3: got {match!r}.") from None

    def report(name: str, value: float) -> None:
        typer.echo(f"  {name}: {by} {value:.4g}", err=True)

    found = []
    for algo in algos:
        if "*" in algo:
            filled, result = match_algorithm(
                pipeline, request, algo, items[:1], by=by, target=wanted, report=report
            )
            typer.echo(f"{algo} at {match}: {filled}, which gives {result.reached:.4g}")
            found.append(filled)
        else:
            found.append(algo)
    return found


def _finish(output: Path) -> None:
    from nabla_attn.evaluation.curves import draw_curves, draw_true_mass, mean_maps
    from nabla_attn.evaluation.summary import read_records, summary_record

    records = read_records(output)
    record = summary_record(records)
    record.save(output / "summary.json")
    algorithms = record.numbers["algorithms"]
    if len(algorithms) > 1:
        draw_curves(algorithms, output / "curves.png")
    if mean_maps(records, "true_mass"):
        draw_true_mass(records, output / "losses.png")
    _print(algorithms)
    typer.echo(f"Records, videos, summary.json, curves.png: {output}")


def _print(algorithms: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = {
        "density": ("pairs kept", "{:.1%}"),
        "seconds": ("seconds", "{:.2f}"),
        "psnr": ("PSNR", "{:.1f}"),
        "ssim": ("SSIM", "{:.4f}"),
        "lpips": ("LPIPS", "{:.4f}"),
        "judge_all": ("all right", "{:.0%}"),
        "clip": ("CLIP", "{:.2f}"),
        "true_mass": ("true mass", "{:.1%}"),
        "best_mass": ("at best", "{:.1%}"),
    }
    shown = [name for name in columns if any(name in entry for entry in algorithms.values())]
    console, table = Console(highlight=False), Table()
    # Elsewhere cells would be cut; the report and summary.json have them all.
    has_room = console.width >= 60 + 20 * len(shown)
    table.add_column("algorithm", no_wrap=True, min_width=max(map(len, algorithms)))
    for heading in (*(columns[name][0] for name in shown), "videos"):
        table.add_column(heading, justify="right")
    for algo, entry in algorithms.items():
        cells = []
        for name in shown:
            value = entry.get(name, {}).get("value")
            interval = [entry.get(name, {}).get(side) for side in ("low", "high")]
            form = columns[name][1]
            text = "" if value is None else form.format(value)
            if has_room and value is not None and None not in interval:
                text += f" [{form.format(interval[0])}, {form.format(interval[1])}]"
            cells.append(text)
        table.add_row(algo, *cells, str(entry["ssim"]["count"]))
    console.print(table)


def _read_shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit()):
        raise ValueError(f"--shard takes K/N such as 0/2: got {text!r}.")
    return int(index), int(count)


def _load_lpips(path: Path | None) -> Any:
    if path is None:
        return None
    from functools import partial

    from nabla_attn.evaluation.lpips import LPIPS, measure_lpips

    return partial(measure_lpips, LPIPS(path))


def _load_clip(path: Path | None) -> Any:
    if path is None:
        return None
    from nabla_attn.evaluation.clip_score import ClipScore

    return ClipScore(path)
