"""`nabla view`: which blocks attended which, on one page without a server."""

from pathlib import Path
from typing import Annotated

import typer

from nabla_attn.cli import options as opt
from nabla_attn.cli import output as out

MAPS = ".maps.safetensors"


def view(
    run: Annotated[
        Path, typer.Argument(help="The mp4 of a run made with --record-maps, or its folder.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="The HTML file.", show_default="beside the video")
    ] = None,
    overwrite: opt.Overwrite = False,
    as_json: opt.AsJson = False,
) -> None:
    """Write one HTML page: frames, block maps, density and true recall of a recorded run."""
    from nabla_attn.generation.map_file import RecordedMaps
    from nabla_attn.media import read_video
    from nabla_attn.record import RunRecord
    from nabla_attn.viz.view import write_view

    video = _find_video(run)
    maps = RecordedMaps.load(_maps_of(video))
    record = video.with_suffix(".json")
    target = out.free_path(output or video.with_suffix(".html"), overwrite=overwrite)
    found = RunRecord.load(record) if record.is_file() else None
    write_view(target, read_video(video), maps, found)
    size = target.stat().st_size
    if as_json:
        out.print_json({"page": target, "bytes": size, "video": video, "maps": _maps_of(video)})
    else:
        out.say(f"{target}: {size / 1e3:,.0f} kB. Open it in a browser.")


def _find_video(run: Path) -> Path:
    """Return the mp4 of a recorded run.

    Raises:
        ValueError: There is none, or there are several, which are named.
    """
    if run.is_dir():
        videos = [path for path in sorted(run.rglob("*.mp4")) if _maps_of(path).is_file()]
        if len(videos) > 1:
            names = ", ".join(str(path) for path in videos[:8])
            raise ValueError(f"{run} has {len(videos)} recorded runs: {names}. Pass one of them.")
    else:
        stem = run.name
        for ending in (MAPS, ".mp4", ".json", ".html"):
            stem = stem.removesuffix(ending)
        videos = [path for path in [run.with_name(f"{stem}.mp4")] if _maps_of(path).is_file()]
    if not videos:
        raise ValueError(
            f"{run}: no recorded maps there. Make them: nabla generate --record-maps --output "
            "video.mp4, then nabla view video.mp4."
        )
    return videos[0]


def _maps_of(video: Path) -> Path:
    return video.with_suffix(MAPS)
