"""``nabla report``: one page from records."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of `nabla evaluate` and `nabla vote results`.")
    ],
    output: Annotated[
        Path, typer.Option(help="The page without its ending: .md and .html are written.")
    ] = Path("out/report"),
    title: Annotated[str, typer.Option(help="Its heading.")] = "Quality report",
) -> None:
    """Write settings, tables, curves and pictures of runs as Markdown and HTML."""
    from nabla_attn.files import check_writable
    from nabla_attn.viz.document import write_html, write_markdown
    from nabla_attn.viz.report import build_report

    stem = output.with_suffix("") if output.suffix in (".md", ".html") else output
    check_writable(stem.with_suffix(".html"))
    sections = build_report(runs)
    write_markdown(title, sections, stem.with_suffix(".md"))
    write_html(title, sections, stem.with_suffix(".html"))
    typer.echo(f"{stem.with_suffix('.md')} and {stem.with_suffix('.html')}")
