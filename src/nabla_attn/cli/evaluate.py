"""`nabla evaluate`: algorithms against dense attention on prompts x seeds."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from nabla_attn.cli import options as opt
from nabla_attn.cli import output as out
from nabla_attn.cli.evaluate_records import (
    pack,
    print_summary,
    summary,
    vbench_read,
    vbench_write,
)
from nabla_attn.cli.group import RunByDefault, VerbCommand
from nabla_attn.cli.loading import load_on_own_device

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
    from nabla_attn.evaluation.job import EvaluationJob
    from nabla_attn.evaluation.match import read_target
    from nabla_attn.evaluation.prompts import make_items, take_prompts
    from nabla_attn.evaluation.run import Measures, read_shard
    from nabla_attn.moving_shapes.judge import MovingShapesScorer

    scorer = MovingShapesScorer()
    texts = take_prompts(prompts, num_prompts, scorer)
    items = make_items(texts, opt.read_indices(seeds) or ())
    request = video.base_request(prompt=texts[0], seed=items[0].seed)
    job = EvaluationJob(
        load=partial(_load, video, request, on_own_device=engine != "locks"),
        request=request,
        algorithms=sparse_algo,
        items=items,
        folder=output,
        fps=video.rate,
        target=read_target(match, sparse_algo),
        shard=read_shard(shard),
        measures=Measures.load(scorer, lpips, clip, num_probed),
        engine=engine,
        workers=workers,
        has_gpus=video.device != "cpu",
    )
    by = job.target[0]
    with generation_bars(in_logs=True) as start:
        shared = job.run(
            on_try=lambda algo, value: out.notice("note", f"{algo}: {by} {value:.4g}"),
            on_found=lambda algo, found: out.notice("note", f"{algo} gives {found.reached:.4g}"),
            on_video=lambda label, done, total: start(f"{done + 1}/{total} {label}"),
            on_item=lambda name, _: out.notice("note", name),
        )
    for name, reason in shared.failed.items():
        out.notice("failed", f"{name}: {reason}")
    if shared.elsewhere:
        out.notice("note", f"{len(shared.elsewhere)} items: other processes are at them.")
    if shared.made or shared.there or not shared.failed:
        print_summary(output, as_json=as_json)
    if shared.failed:
        raise typer.Exit(1)


for name, verb in (
    ("summary", summary),
    ("pack", pack),
    ("vbench-write", vbench_write),
    ("vbench-read", vbench_read),
):
    evaluate.command(name, cls=VerbCommand)(verb)


def _load(video: opt.VideoOptions, request: Any, *, on_own_device: bool) -> Any:
    """The pipeline in this process, or on its own device where each worker has one."""
    memory = video.foresee(request)
    if on_own_device:
        pipeline = load_on_own_device(video.model, video.device, video.dtype, **video.loading)
    else:
        pipeline = video.load()
    video.check(pipeline, request, memory)
    return pipeline
