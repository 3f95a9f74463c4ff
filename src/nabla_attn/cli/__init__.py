"""The `nabla` command: one short module per verb, imported when the verb is used."""

import os
from importlib.metadata import version as installed_version
from typing import Annotated

import typer

from nabla_attn.cli.group import VerbGroup

# Idle OpenMP threads would spin on cores that other threads and programs need. Read by torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    name="nabla",
    cls=VerbGroup,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def nabla(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
) -> None:
    """Video generation with block-sparse attention that adapts to each input (NABLA)."""
    if version:
        typer.echo(f"nabla-attn {installed_version('nabla-attn')}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
