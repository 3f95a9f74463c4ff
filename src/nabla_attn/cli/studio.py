"""`nabla studio`: a page on which to try algorithms."""

from typing import Annotated

import typer

from nabla_attn.cli import options as opt
from nabla_attn.cli.loading import load_quietly
from nabla_attn.errors import explain_missing


def studio(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="'builtin' or a diffusers directory; repeat for a choice.", show_default="builtin"
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            help="LoRA weights to offer, beside those of the built-in model; repeat for a choice.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 7860,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="Name that a proxy serves the page under; repeat for more."),
    ] = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
) -> None:
    """Serve a page with prompt, model, adapter and algorithm; dense and sparse side by side."""
    with explain_missing("ui"):
        import gradio  # noqa: F401
    from nabla_attn.studio.page import build_studio, launch, wait

    models = model or ["builtin"]
    adapters = [*(["builtin"] if "builtin" in models else []), *(lora or [])]
    page = build_studio(
        models, lambda name, chosen: load_quietly(name, device, dtype, chosen), adapters
    )
    typer.echo(f"Studio: {launch(page, host, port, allow_host or ())}   (Ctrl-C stops)")
    wait(page)
