"""``nabla encode``: videos and captions to what ``nabla train`` reads."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nabla_attn.cli import options as opt

if TYPE_CHECKING:
    from nabla_attn.training.data.clip import Source
    from nabla_attn.training.data.encode import Summary
    from nabla_attn.training.data.sizes import Size

WORLD = "world"
OWN = "the videos' own"


def encode(
    source: Annotated[
        list[str],
        typer.Argument(
            help="A folder of videos with metadata.jsonl, metadata.csv or a .txt beside each; "
            ".tar files of webdataset, or a folder of them; or 'world', the built-in one."
        ),
    ],
    output: Annotated[Path, typer.Option(help="The folder to write; a begun one goes on.")],
    model: opt.Model = "builtin",
    height: Annotated[int | None, typer.Option(help="Pixels.", show_default=OWN)] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.", show_default=OWN)] = None,
    frames: Annotated[int | None, typer.Option(help="The first so many.", show_default="all")] = (
        None
    ),
    sizes: Annotated[
        list[str] | None,
        typer.Option(
            help="HEIGHTxWIDTHxFRAMES; repeat it, and each video goes to the closest that it fills."
        ),
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second.", show_default=OWN)] = None,
    shard_size: Annotated[int, typer.Option(help="Videos in a file.")] = 64,
    clips: Annotated[
        int | None, typer.Option(help="Of 'world': how many.", show_default="1024")
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(help="Of 'world': shapes in a scene, such as 1,2,3.", show_default="1"),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of 'world': seed of the scenes.", show_default="0")
    ] = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
) -> None:
    """Encode videos and captions once, for training: latents and embeddings in sharded files.

    Videos that cannot be used are skipped, counted, and listed in skipped.jsonl. Any number of
    processes and machines may share the folder, and a run that was stopped goes on.
    """
    from nabla_attn.distributed import local_device
    from nabla_attn.files import check_writable
    from nabla_attn.generation.pipeline import model_directory, resolve_device
    from nabla_attn.training.data.encode import EncodeRequest
    from nabla_attn.training.data.encode import encode as encode_all
    from nabla_attn.training.data.sizes import Size

    model_directory(model)
    wanted = _read_sizes(sizes or [], height, width, frames)
    if source == [WORLD]:
        if fps is not None:
            raise ValueError("--fps is for videos; the built-in world has no rate of its own.")
        wanted = wanted or (_model_size(model),)
        found = _world(1024 if clips is None else clips, wanted, seed or 0, shapes or "1")
    else:
        if (clips, shapes, seed) != (None, None, None):
            raise ValueError("--clips, --shapes and --seed are for the source 'world' alone.")
        found = _find_source(source)
    request = EncodeRequest(wanted or (Size(),), fps=fps, shard_size=shard_size)
    check_writable(output / "index.json")
    pipeline = opt.load_quietly(model, str(local_device(resolve_device(device))), dtype)
    with _bar(len(found)) as tell:
        summary = encode_all(found, pipeline, output, request, tell)
    _report(output, summary)


def _find_source(paths: list[str]) -> "Source":
    from nabla_attn.training.data.folder import METADATA, FolderSource
    from nabla_attn.training.data.shards import ShardSource

    files = [Path(path) for path in paths]
    missing = [path for path in files if not path.exists()]
    if missing:
        raise ValueError(f"no videos at {missing[0]}: there is no such file or folder.")
    if len(files) == 1 and files[0].is_dir():
        tars = sorted(files[0].glob("*.tar"))
        if not tars or any((files[0] / name).is_file() for name in METADATA):
            return FolderSource(files[0])
        return ShardSource(tars)
    others = [path for path in files if path.suffix != ".tar"]
    if others:
        raise ValueError(
            f"{others[0]} is not a .tar file. Pass one folder, or .tar files, or 'world'."
        )
    return ShardSource(files)


def _world(clips: int, sizes: "tuple[Size, ...]", seed: int, shapes: str) -> "Source":
    from nabla_attn.moving_shapes.dataset import WorldSource

    return WorldSource(clips, sizes, seed, opt.read_indices(shapes) or ())


def _read_sizes(
    sizes: list[str], height: int | None, width: int | None, frames: int | None
) -> "tuple[Size, ...]":
    """What was asked for; nothing if nothing was."""
    from nabla_attn.training.data.sizes import Size, parse_size

    single = Size(frames, height, width)
    if sizes and single != Size():
        raise ValueError("pass either --sizes or --height, --width and --frames.")
    return tuple(parse_size(text) for text in sizes) or ((single,) if single != Size() else ())


def _model_size(model: str) -> "Size":
    from nabla_attn.generation.pipeline import model_directory
    from nabla_attn.generation.request import ModelDefaults
    from nabla_attn.training.data.sizes import Size

    defaults = ModelDefaults.load(model_directory(model))
    return Size(defaults.frames, defaults.height, defaults.width)


def _report(output: Path, summary: "Summary") -> None:
    skipped = summary.skipped.total()
    typer.echo(f"{output}: {summary.encoded} videos encoded, {skipped} skipped.")
    for kind, count in summary.skipped.most_common():
        typer.echo(f"skipped: {count} {kind}", err=True)
    if summary.elsewhere:
        typer.echo(f"{summary.elsewhere} of {summary.shards} shards: other processes are at them.")
        return
    if not summary.encoded:
        raise ValueError(f"no video could be used. {output / 'skipped.jsonl'} says why.")
    typer.echo(f"Next: nabla train finetune data.folder={output}")


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int], None]]:
    """Yield a callback that moves a bar on stderr by a number of videos."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("encoding", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Transient, so that an error stays the one line on stderr.
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bars:
        task = bars.add_task("encoding", total=total)
        yield lambda count: bars.advance(task, count)
