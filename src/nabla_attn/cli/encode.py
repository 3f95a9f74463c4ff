"""`nabla encode`: videos and captions to what `nabla train` reads."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nabla_attn.cli import options as opt
from nabla_attn.cli.loading import load_on_own_device
from nabla_attn.cli.output import notice, print_json, say

if TYPE_CHECKING:
    from nabla_attn.training.data.clip import ClipSource
    from nabla_attn.training.data.encode import EncodeSummary

OWN = "the videos' own"


def encode(
    source: Annotated[
        list[str],
        typer.Argument(
            help="A folder of videos with metadata.jsonl, metadata.csv or a .txt beside each; "
            ".tar files of webdataset, or a folder of them; or 'world', the built-in one."
        ),
    ],
    output: Annotated[Path, typer.Option(help="The folder; an interrupted run continues.")],
    model: opt.Model = "builtin",
    height: Annotated[int | None, typer.Option(help="Pixels.", show_default=OWN)] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.", show_default=OWN)] = None,
    frames: Annotated[int | None, typer.Option(help="Frames taken.", show_default="all")] = None,
    sizes: Annotated[
        list[str] | None,
        typer.Option(
            help="HEIGHTxWIDTHxFRAMES; repeat it, and each video goes to the closest that it fills."
        ),
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second.", show_default=OWN)] = None,
    shard_size: Annotated[int, typer.Option(help="Videos in a file.")] = 64,
    clips: Annotated[
        int | None, typer.Option(help="Number of clips, with 'world'.", show_default="1024")
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(help="Shapes in a scene, such as 1,2,3, with 'world'.", show_default="1"),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the scenes, with 'world'.", show_default="0")
    ] = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    engine: opt.Engine = "locks",
    workers: opt.Workers = None,
    force: opt.Force = False,
    as_json: opt.AsJson = False,
) -> None:
    """Encode videos and captions once, for training: latents and embeddings in sharded files.

    Videos that cannot be used are skipped, counted, and listed in skipped.jsonl. Any number of
    processes and machines may share the folder, and a run that was stopped continues.
    """
    from nabla_attn.cli.progress import count_bar
    from nabla_attn.cost.memory import force_memory
    from nabla_attn.files import check_writable
    from nabla_attn.generation.pipeline import model_directory
    from nabla_attn.training.data.encode import EncodeRequest
    from nabla_attn.training.data.encode import encode as encode_all
    from nabla_attn.training.data.folder import open_source
    from nabla_attn.training.data.resize import Size

    model_directory(model)
    single = Size(frames, height, width)
    if sizes and single != Size():
        raise ValueError("pass either --sizes or --height, --width and --frames.")
    wanted = tuple(map(Size.parse, sizes or ())) or (single,)
    if source == ["world"]:
        from nabla_attn.moving_shapes.dataset import WorldSource

        if fps is not None:
            raise ValueError("--fps is for videos; the built-in world has no rate of its own.")
        if wanted == (Size(),):
            wanted = (Size.of_model(model_directory(model)),)
        count, numbers = 1024 if clips is None else clips, opt.read_indices(shapes or "1") or ()
        found: ClipSource = WorldSource(count, wanted, seed or 0, numbers)
    else:
        if (clips, shapes, seed) != (None, None, None):
            raise ValueError("--clips, --shapes and --seed are for the source 'world' alone.")
        found = open_source([Path(path) for path in source])
    request = EncodeRequest(wanted, fps=fps, shard_size=shard_size)
    check_writable(output / "index.json")
    load = partial(load_on_own_device, model, device, dtype)
    with force_memory(force), count_bar("encoding", "clips") as on_progress:
        summary = encode_all(
            found,
            load,
            output,
            request,
            engine=engine,
            workers=workers,
            has_gpus=device != "cpu",
            on_progress=on_progress,
        )
    if as_json:
        print_json({"folder": str(output)} | vars(summary))
    else:
        _report(output, summary)
    if not summary.encoded and not summary.elsewhere:
        raise ValueError(f"no video could be used. {output / 'skipped.jsonl'} says why.")


def _report(output: Path, summary: "EncodeSummary") -> None:
    skipped = summary.skipped.total()
    say(f"{output}: {summary.encoded} videos encoded, {skipped} skipped.")
    for kind, count in summary.skipped.most_common():
        notice("skipped", f"{count} {kind}")
    if summary.cut:
        say(f"captions that the text encoder did not read to the end: {summary.cut}")
    if summary.elsewhere:
        say(f"{summary.elsewhere} of {summary.shards} shards: other processes are at them.")
    elif summary.encoded:
        say(f"Next: nabla train finetune data.folder={output}")
