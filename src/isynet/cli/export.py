"""`isynet export`: a network as ONNX, checked."""

from pathlib import Path
from typing import Annotated

import typer

from isynet.cli.output import AsJson, Model, Size
from nabla_attn.cli.output import print_json, say


def export(
    model: Model,
    output: Annotated[Path, typer.Option(help="The .onnx file.")] = Path("out/network.onnx"),
    size: Size = 224,
    num_classes: Annotated[
        int | None, typer.Option(min=0, help="Number of classes.", show_default="the weights'")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a network as ONNX and check its outputs against PyTorch with onnxruntime."""
    from isynet.checkpoint import create
    from isynet.onnx_file import export as export_network

    done = export_network(create(model, num_classes), output, size)
    if as_json:
        print_json({"path": str(done.path), "error": done.error, "size": list(done.size)})
    else:
        say(f"{done.path}: differs from PyTorch by {done.error:.1e} of the largest output")
