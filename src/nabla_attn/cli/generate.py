"""``nabla generate``: a prompt to an mp4 and its record."""

from pathlib import Path
from typing import Annotated

import typer

from nabla_attn.cli import options as opt


def generate(
    prompt: opt.Prompt,
    model: opt.Model = "builtin",
    sparse_algo: Annotated[
        str | None,
        typer.Option(
            help="nabla-0.7, sta-11-3-3, nabla-0.6_sta-11-3-3, topk-0.2 or dense.",
            show_default=opt.MODEL_DEFAULT,
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="The mp4; its record goes beside it.")] = Path(
        "out/video.mp4"
    ),
    height: opt.Height = None,
    width: opt.Width = None,
    frames: opt.Frames = None,
    steps: opt.Steps = None,
    guidance: opt.Guidance = None,
    seed: opt.Seed = 0,
    fps: opt.Fps = None,
    negative_prompt: opt.NegativePrompt = "",
    schedule: opt.ScheduleFile = None,
    record_maps: Annotated[
        bool, typer.Option("--record-maps", help="Also record block maps, for `nabla view`.")
    ] = False,
    map_steps: Annotated[str, typer.Option(help="Steps to record, such as 0,10,19.")] = "",
    map_layers: Annotated[str, typer.Option(help="Layers to record.")] = "",
    map_heads: Annotated[str, typer.Option(help="Heads to record.")] = "",
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
) -> None:
    """Make a video from a prompt: an mp4, and beside it a .json record of the run."""
    from nabla_attn.cli.progress import generation_bars
    from nabla_attn.files import check_writable
    from nabla_attn.generation.generate import generate as make_video
    from nabla_attn.generation.video import check_fps, write_video

    defaults = opt.read_defaults(model)
    request = opt.make_request(
        defaults,
        sparse_algo=sparse_algo,
        schedule=schedule,
        prompt=prompt,
        negative_prompt=negative_prompt,
        height=height,
        width=width,
        frames=frames,
        steps=steps,
        guidance=guidance,
        seed=seed,
    )
    rate = check_fps(defaults.fps if fps is None else fps)
    if output.suffix.lower() != ".mp4":
        raise ValueError(f"the output must be an .mp4 file, got {output}.")
    check_writable(output)
    pipeline = opt.load_quietly(model, device, dtype)
    recorder = None
    if record_maps:
        from nabla_attn.generation.record_maps import MapRecorder

        if request.is_dense:
            raise ValueError("dense attention has no maps to record. Pass --sparse-algo nabla-0.7.")
        recorder = MapRecorder(
            pipeline,
            request,
            steps=opt.read_indices(map_steps),
            layers=opt.read_indices(map_layers),
            heads=opt.read_indices(map_heads),
        )
    with generation_bars() as start:
        video, record = make_video(
            pipeline,
            request,
            progress=start(request.sparse_algo),
            on_apply=recorder.attach if recorder else None,
        )
    write_video(video, output, rate)
    if recorder:
        recorder.result().save(output.with_suffix(".maps.safetensors"))
        record = recorder.note_in(record)
    record.save(output.with_suffix(".json"))
    _summarise(output, record)


def _summarise(output: Path, record: object) -> None:
    from nabla_attn.record import RunRecord

    assert isinstance(record, RunRecord)
    seconds, kept = record.numbers["seconds"], record.numbers["attention"]["density"]
    typer.echo(
        f"{output}: {record.config['sparse_algo']}, {kept:.1%} of token pairs kept; "
        f"text {seconds['text']:.2f} s, transformer {seconds['transformer']:.2f} s, "
        f"decode {seconds['decode']:.2f} s. Record: {output.with_suffix('.json')}"
    )
