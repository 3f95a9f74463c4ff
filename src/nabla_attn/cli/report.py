"""`nabla report`: one page from records."""

from pathlib import Path
from typing import Annotated

import typer

from nabla_attn.cli import options as opt
from nabla_attn.cli import output as out


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of `nabla evaluate` and `nabla vote results`.")
    ],
    output: Annotated[
        Path, typer.Option(help="The page without its ending; .md and .html are written.")
    ] = Path("out/report"),
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Quality report",
    overwrite: opt.Overwrite = False,
    as_json: opt.AsJson = False,
) -> None:
    """Write verdict, videos, tables, curves and settings of runs as Markdown and HTML."""
    from nabla_attn.files import check_writable
    from nabla_attn.viz.document import Text, write_html, write_markdown
    from nabla_attn.viz.report import build_report

    # Appended: a name such as report-nabla-0.7 has no ending to replace.
    stem = output.with_suffix("") if output.suffix in (".md", ".html") else output
    html = out.free_path(stem.with_name(f"{stem.name}.html"), overwrite=overwrite)
    markdown = html.with_suffix(".md")
    sections = build_report(runs)
    check_writable(html)
    write_markdown(title, sections, markdown)
    write_html(title, sections, html)
    blocks = [block for section in sections for block in section.blocks]
    verdicts = [block.text for block in blocks if isinstance(block, Text) and block.is_lead]
    if as_json:
        out.print_json({"markdown": markdown, "html": html, "verdicts": verdicts})
    else:
        out.say("\n".join([*verdicts, f"{markdown} and {html}"]))
