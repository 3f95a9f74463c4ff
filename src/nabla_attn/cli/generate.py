"""``nabla generate``: a prompt, or a list of them, to mp4 files with their records."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nabla_attn.cli import options as opt
from nabla_attn.cli.prompt_list import first_bars, make_list

if TYPE_CHECKING:
    from PIL.Image import Image

    from nabla_attn.generation.request import GenerationRequest

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
) -> None:
    """Make a video from a prompt: an mp4, and beside it a .json record of the run.

    With --prompts, make one per line of a file: any number of processes and machines may share the
    list and the folder, and a run that was stopped goes on. Under torchrun without --prompts, the
    processes share one video.
    """

    if (prompt is None) == (prompts is None):
        raise ValueError("pass either --prompt TEXT or --prompts FILE.")
    if not record_maps and (map_steps or map_layers or map_heads):
        raise ValueError(
            "--map-steps, --map-layers and --map-heads choose maps: add --record-maps."
        )
    for option, is_given in (("--record-maps", record_maps), ("--image", image is not None)):
        if prompts is not None and is_given:
            raise ValueError(f"{option} is for one video. Pass --prompt.")
    if prompts is None and (engine, workers) != ("locks", None):
        raise ValueError("--engine and --workers share a list between processes: pass --prompts.")
    request = video.request(prompt=prompt or "", seed=seed, sparse_algo=sparse_algo)
    rate = video.rate
    if prompts is not None:
        make_list(prompts, request, output or FOLDER, rate, video, engine=engine, workers=workers)
        return
    maps = None
    if record_maps:
        if request.is_dense:
            raise ValueError("dense attention has no maps to record. Pass --sparse-algo nabla-0.7.")
        maps = {
            "steps": opt.read_indices(map_steps),
            "layers": opt.read_indices(map_layers),
            "heads": opt.read_indices(map_heads),
        }
    first = None if image is None else _read_first(image, request)
    _make_one(request, output or VIDEO, rate, video, maps, first)


def _make_one(
    request: "GenerationRequest",
    output: Path,
    fps: float,
    options: opt.VideoOptions,
    maps: dict[str, Any] | None,
    image: "Image | None",
) -> None:
    from nabla_attn.distributed import process_index
    from nabla_attn.files import check_writable
    from nabla_attn.generation.generate import generate as make_video
    from nabla_attn.generation.video import write_video

    if output.suffix.lower() != ".mp4":
        raise ValueError(f"the output must be an .mp4 file, got {output}.")
    check_writable(output)
    with _shared_pipeline(request, options, has_maps=maps is not None) as pipeline:
        recorder = None
        if maps is not None:
            from nabla_attn.generation.record_maps import MapRecorder

            recorder = MapRecorder(pipeline, request, **maps)
        with first_bars() as start:
            video, record = make_video(
                pipeline,
                request,
                on_progress=start(request.sparse_algo),
                inputs={} if image is None else {"image": image},
                on_apply=recorder.attach if recorder else None,
            )
    if process_index() != 0:
        return
    if image is not None:
        digest = hashlib.sha256(image.tobytes()).hexdigest()
        record = replace(record, config=record.config | {"image_sha256": digest})
    write_video(video, output, fps)
    maps_file = output.with_suffix(".maps.safetensors")
    # Those of an earlier run under this name would pass for this one's.
    maps_file.unlink(missing_ok=True)
    if recorder:
        recorder.result().save(maps_file)
        record = recorder.note_in(record)
    record.save(output.with_suffix(".json"))
    _summarise(output, record)


def _read_first(path: Path, request: "GenerationRequest") -> "Image":
    from nabla_attn.media import read_image

    image = read_image(path)
    if image.size != (request.width, request.height):
        raise ValueError(
            f"{path} has {image.width}x{image.height} pixels and the video "
            f"{request.width}x{request.height}. Scale or crop it, or pass --width {image.width} "
            f"--height {image.height}."
        )
    return image


@contextmanager
def _shared_pipeline(
    request: "GenerationRequest", options: opt.VideoOptions, *, has_maps: bool
) -> Iterator[Any]:
    """The pipeline; under torchrun, one whose transformers share each video between processes."""
    from nabla_attn import distributed
    from nabla_attn.generation.pipeline import resolve_device
    from nabla_attn.wan.placement import WanPlacement, check_placement, distribute

    processes = distributed.num_processes()
    if processes == 1:
        yield options.load()
        return
    import torch
    import torch.distributed as dist

    place = distributed.local_device(resolve_device(options.device))
    gpus, here = torch.accelerator.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if gpus < here or (place.type == "cpu" and torch.cuda.is_available()):
        raise ValueError(
            f"{processes} processes share one video through diffusers, which needs a GPU for each: "
            f"this machine has {gpus}, and --device is {options.device}. Start one process, or "
            "pass --prompts FILE to make a video in each."
        )
    if has_maps:
        raise ValueError("maps are recorded in one process, which has all heads. Drop torchrun.")
    placement = WanPlacement(ulysses_size=processes)
    check_placement(placement, is_sparse=not request.is_dense)
    pipeline = options.load(str(place))
    try:
        distribute(pipeline, placement, place)
        yield pipeline
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _summarise(output: Path, record: object) -> None:
    from nabla_attn.record import RunRecord

    assert isinstance(record, RunRecord)
    seconds, kept = record.numbers["seconds"], record.numbers["attention"]["density"]
    typer.echo(
        f"{output}: {record.config['sparse_algo']}, {kept:.1%} of token pairs kept; "
        f"text {seconds['text']:.2f} s, transformer {seconds['transformer']:.2f} s, "
        f"decode {seconds['decode']:.2f} s. Record: {output.with_suffix('.json')}"
    )
