"""`isynet show`: the stages of a network."""

from pathlib import Path
from typing import Annotated

import typer

from isynet.cli.output import AsJson, Model, Size, print_rows
from nabla_attn.cli.output import say


def show(
    model: Model,
    size: Size = 224,
    num_classes: Annotated[
        int | None,
        typer.Option(min=0, help="Number of classes.", show_default="1000, or the weights'"),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Also draw MEM of the parts into this .png file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show a network part by part: channels, parameters, work and plain MEM."""
    import torch

    from isynet.checkpoint import create
    from isynet.counting import count_parts
    from isynet.pictures import draw_mem

    with torch.device("meta"):
        net = create(model, num_classes)
    rows = [
        {
            "part": part.name,
            "channels": part.channels,
            "pixels": part.pixels,
            "M parameters": part.parameters / 1e6,
            "M MACs": part.work.matrix / 1e6,
            "M moved": part.work.moved / 1e6,
            "M vector": part.work.vector / 1e6,
            "MEM": part.work.mem,
        }
        for part in count_parts(net, size)
    ]
    if not as_json:
        say(str(net.architecture))
    print_rows(rows, as_json=as_json)
    if picture:
        draw_mem(net, picture, size=size)
