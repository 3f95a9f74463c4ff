"""`isynet convert`: checkpoints of the authors' code to safetensors."""

from pathlib import Path
from typing import Annotated

import typer

from nabla_attn.cli.output import say


def convert(
    source: Annotated[Path, typer.Argument(help="The .ckpt file.")],
    output: Annotated[
        Path | None, typer.Option(help="The .safetensors file.", show_default="beside the source")
    ] = None,
    architecture: Annotated[
        str | None,
        typer.Option(
            help="What it was trained as: a name, a string or a .json file.",
            show_default="the published network it fits",
        ),
    ] = None,
    peer: Annotated[
        bool, typer.Option("--peer", help="Take the second network of a mutual-learning pair.")
    ] = False,
) -> None:
    """Convert a MindSpore checkpoint; neither MindSpore nor protobuf is needed."""
    from isynet.checkpoint import convert as convert_checkpoint

    say(str(convert_checkpoint(source, output, architecture=architecture, is_peer=peer)))
