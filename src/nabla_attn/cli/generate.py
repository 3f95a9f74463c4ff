"""`nabla generate`: a prompt, or a list of them, to mp4 files with their records."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nabla_attn.cli import options as opt
from nabla_attn.cli import output as out
from nabla_attn.cli.prompt_list import first_bars, make_list

if TYPE_CHECKING:
    from nabla_attn.generation.memory import MemoryEstimate
    from nabla_attn.record import RunRecord

VIDEO, FOLDER = Path("out/video.mp4"), Path("out/videos")


@opt.with_video_options
def generate(
    video: opt.VideoOptions,
    prompt: Annotated[str | None, typer.Option(help="What the video shows.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='Make many videos: a file with a prompt or {"prompt": ..., "seed": ...} per line.'
        ),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(help="The first frame, for image-to-video pipelines; of the video's size."),
    ] = None,
    last_image: Annotated[
        Path | None,
        typer.Option(help="The last frame, for models of first and last frames."),
    ] = None,
    sparse_algo: Annotated[
        str | None,
        typer.Option(
            help="nabla-0.7, sta-11-3-3, nabla-0.6_sta-11-3-3, topk-0.2 or dense.",
            show_default=opt.MODEL_DEFAULT,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="The mp4; its record goes beside it. With --prompts a folder.",
            show_default=f"{VIDEO}; with --prompts {FOLDER}",
        ),
    ] = None,
    seed: opt.Seed = 0,
    record_maps: Annotated[
        bool, typer.Option("--record-maps", help="Also record block maps, for `nabla view`.")
    ] = False,
    map_steps: Annotated[str, typer.Option(help="Steps to record, such as 0,10,19.")] = "",
    map_layers: Annotated[str, typer.Option(help="Layers to record.")] = "",
    map_heads: Annotated[str, typer.Option(help="Heads to record.")] = "",
    engine: opt.Engine = "locks",
    workers: opt.Workers = None,
    overwrite: opt.Overwrite = False,
    as_json: opt.AsJson = False,
) -> None:
    """Make a video from a prompt: an mp4, and beside it a .json record of the run.

    With --prompts, make one per line of a file: any number of processes and machines may share the
    list and the folder, and a run that was stopped continues. Under torchrun without --prompts, the
    processes share one video.
    """
    from nabla_attn.generation.job import VideoJob, shared_pipeline

    if (prompt is None) == (prompts is None):
        raise ValueError("pass either --prompt TEXT or --prompts FILE.")
    if prompt is not None and not prompt.strip():
        raise ValueError("the prompt is empty. Say what the video shows: --prompt TEXT.")
    choice = {"steps": map_steps, "layers": map_layers, "heads": map_heads}
    if any(choice.values()) and not record_maps:
        raise ValueError(
            "--map-steps, --map-layers and --map-heads choose maps: add --record-maps."
        )
    one_only = {"--record-maps": record_maps, "--image": image is not None}
    one_only |= {"--last-image": last_image is not None, "--json": as_json}
    if prompts is not None and (given := [name for name, is_on in one_only.items() if is_on]):
        raise ValueError(f"{given[0]} is for one video. Pass --prompt.")
    if prompts is None and (engine, workers) != ("locks", None):
        raise ValueError("--engine and --workers share a list between processes: pass --prompts.")
    request = video.request(prompt=prompt or "", seed=seed, sparse_algo=sparse_algo)
    if prompts is not None:
        make_list(
            prompts, request, output or FOLDER, video.rate, video, engine=engine, workers=workers
        )
        return
    maps = {name: opt.read_indices(text) for name, text in choice.items()}
    job = VideoJob(
        request=request,
        output=out.free_path(output or VIDEO, overwrite=overwrite),
        fps=video.rate,
        image=image,
        last_image=last_image,
        maps=maps if record_maps else None,
    )
    memory = video.foresee(request, job.given_frames)
    with (
        shared_pipeline(video.load, video.device, has_maps=record_maps) as pipeline,
        first_bars() as start,
    ):
        video.check(pipeline, request, memory)
        record = job.run(pipeline, on_progress=start(request.sparse_algo))
    if record is not None:
        _print(job.output, record, memory, as_json=as_json)


def _print(output: Path, record: "RunRecord", memory: "MemoryEstimate", *, as_json: bool) -> None:
    if as_json:
        place: dict[str, Any] = {"video": output, "record": output.with_suffix(".json")}
        place["memory"] = memory.to_dict()
        out.print_json(place | {"config": record.config, "numbers": record.numbers})
        return
    seconds, kept = record.numbers["seconds"], record.numbers["attention"]["density"]
    out.say(
        f"{output}: {record.config['sparse_algo']}, {kept:.1%} of token pairs kept; "
        f"text {seconds['text']:.2f} s, transformer {seconds['transformer']:.2f} s, "
        f"decode {seconds['decode']:.2f} s. Record: {output.with_suffix('.json')}"
    )
