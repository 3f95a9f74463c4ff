"""``nabla studio``: a page on which to try algorithms."""

from typing import Annotated

import typer

from nabla_attn.cli import options as opt


def studio(
    model: Annotated[
        list[str] | None, typer.Option(help="'builtin' or a directory; repeat for a choice.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 7860,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
) -> None:
    """Serve a page with prompt, algorithm and threshold; dense and sparse side by side."""
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError(
            "gradio is not installed; the studio needs it. Run: pip install 'nabla-attn[ui]'."
        ) from None
    from nabla_attn.studio.page import build_studio, launch

    models = model or ["builtin"]
    page = build_studio(models, lambda name: opt.load_quietly(name, device, dtype))
    typer.echo(f"Studio: {launch(page, host, port)}   (Ctrl-C stops)")
    page.block_thread()
