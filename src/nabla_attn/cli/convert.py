"""`nabla convert`: an original Wan checkpoint to a diffusers directory."""

from pathlib import Path
from typing import Annotated

import typer

from nabla_attn.cli import output as out


def convert(
    source: Annotated[Path, typer.Argument(help="The checkpoint in the original Wan layout.")],
    target: Annotated[
        Path, typer.Argument(help="The directory to make; a stopped run continues in it.")
    ],
    dtype: Annotated[
        str, typer.Option(help="stored, float32, bfloat16 or float16; the VAE stays as stored.")
    ] = "stored",
) -> None:
    """Write an original Wan checkpoint as a diffusers directory: streamed, resumable, verified."""
    from nabla_attn.cli.loading import quiet_libraries
    from nabla_attn.cli.progress import loading_bars
    from nabla_attn.generation.placement import DTYPES
    from nabla_attn.wan.convert import convert_wan

    if dtype != "stored" and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}. Known: stored, {', '.join(DTYPES)}.")
    quiet_libraries()
    with loading_bars() as on_progress:
        convert_wan(source, target, dtype=DTYPES.get(dtype), on_progress=on_progress)
    out.say(f"{target}: written and compared with {source}, tensor by tensor.")
