"""`nabla evaluate`: algorithms against dense attention on prompts x seeds."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from nabla_attn.cli import options as opt
from nabla_attn.cli import output as out
from nabla_attn.cli.group import VerbCommand
from nabla_attn.cli.loading import load_on_own_device

if TYPE_CHECKING:
    from nabla_attn.progress import ProgressCallback


class RunByDefault(TyperGroup):
    """`nabla evaluate OPTIONS` is `nabla evaluate run OPTIONS`."""

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
    output: Annotated[Path, typer.Option(help="Folder of the run; a stopped run continues.")] = (
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
    as_json: opt.AsJson = False,
) -> None:
    """Make the videos, measure them, and write records, a summary and curves."""
    from nabla_attn.cli.progress import generation_bars
    from nabla_attn.evaluation.match import fill_algorithms, read_target
    from nabla_attn.evaluation.prompts import make_items, take_prompts
    from nabla_attn.evaluation.run import (
        Evaluation,
        Measures,
        evaluate_items,
        list_algorithms,
        read_shard,
        take_shard,
    )
    from nabla_attn.moving_shapes.judge import MovingShapesScorer

    scorer = MovingShapesScorer()
    texts = take_prompts(prompts, num_prompts, scorer)
    items = make_items(texts, opt.read_indices(seeds) or ())
    request = video.base_request(prompt=texts[0], seed=items[0].seed)
    part, (by, target), rate = read_shard(shard), read_target(match, sparse_algo), video.rate
    if workers is not None and engine == "locks":
        raise ValueError("--workers is for --engine ray; start more processes instead.")
    measures = Measures.load(scorer, lpips, clip, num_probed)
    pipeline = None
    if match or engine == "locks":
        pipeline = video.load()
        video.check(pipeline, request)
    algos = fill_algorithms(
        pipeline,
        request,
        sparse_algo,
        items[:1],
        by,
        target,
        on_try=lambda algo, value: out.notice("note", f"{algo}: {by} {value:.4g}"),
        on_found=lambda algo, found: out.notice("note", f"{algo} gives {found.reached:.4g}"),
    )
    names = list_algorithms(algos)
    with generation_bars(in_logs=True) as start:

        def on_video(label: str, done: int, total: int) -> "ProgressCallback":
            return start(f"{done + 1}/{total} {label}")

        if engine == "locks":
            evaluation = Evaluation(pipeline, request, output, fps=rate, measures=measures)
            shared = evaluation.run(names, items, shard=part, on_video=on_video)
        else:
            shared = evaluate_items(
                partial(_load_evaluation, video, request, output, rate, measures),
                output,
                names,
                take_shard(items, part),
                measures,
                engine=engine,
                workers=workers,
                has_gpus=video.device != "cpu",
                on_item=lambda name, _: out.notice("note", name),
            )
    for name, reason in shared.failed.items():
        out.notice("failed", f"{name}: {reason}")
    if shared.elsewhere:
        out.notice("note", f"{len(shared.elsewhere)} items: other processes are at them.")
    if shared.made or shared.there or not shared.failed:
        _finish(output, as_json=as_json)
    if shared.failed:
        raise typer.Exit(1)


@evaluate.command(cls=VerbCommand)
def summary(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")], as_json: opt.AsJson = False
) -> None:
    """Write and print the summary of a run again, such as after its last process."""
    _finish(run, as_json=as_json)


@evaluate.command(cls=VerbCommand)
def pack(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    output: Annotated[Path, typer.Argument(help="Where the packed run goes.")],
) -> None:
    """Write a run's records as one file an algorithm, to publish; `nabla report` reads them."""
    from nabla_attn.evaluation.records import pack_run

    out.say(f"{output}: {pack_run(run, output)} items that every algorithm has made.")


@evaluate.command("vbench-write", cls=VerbCommand)
def vbench_write(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    output: Annotated[Path, typer.Argument(help="Where the copies go.")],
) -> None:
    """Copy a run's videos under the names that VBench expects, and say how to score them."""
    from nabla_attn.evaluation.vbench import write_layout

    for algo, count in write_layout(run, output).items():
        out.say(
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
        out.say(f"{name:24s} {100 * score:6.2f}")
    for name, score in compute_totals(scores).items():
        out.say(f"{name:24s} {score:6.2f}")


def _load_evaluation(
    video: opt.VideoOptions, request: Any, output: Path, fps: float, measures: Any
) -> Any:
    """The evaluation with its pipeline on this process's own device."""
    from nabla_attn.evaluation.run import Evaluation

    lora = video.lora or ()
    pipeline = load_on_own_device(video.model, video.device, video.dtype, lora, **video.placement)
    video.check(pipeline, request)
    return Evaluation(pipeline, request, output, fps=fps, measures=measures)


def _finish(output: Path, *, as_json: bool) -> None:
    from nabla_attn.evaluation.curves import write_summary
    from nabla_attn.evaluation.records import means_table

    record = write_summary(output)
    if as_json:
        out.print_json({"folder": output, "algorithms": record.numbers["algorithms"]})
        return
    out.print_table(*means_table(record.numbers["algorithms"]))
    out.say(f"Records, videos, summary.json, curves.png: {output}")
