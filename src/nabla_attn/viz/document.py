"""A document of paragraphs, tables and pictures, written as Markdown and as one HTML file."""

import base64
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from urllib.parse import quote

from nabla_attn.files import whole_file, write_text

STYLE = (
    ":root{color-scheme:light dark;--paper:#f6f7f9;--card:#fff;--ink:#1b1f24;--muted:#5b6573;"
    "--line:#d8dee6}@media (prefers-color-scheme:dark){:root{--paper:#12161b;--card:#1b2128;"
    "--ink:#e8ecf1;--muted:#9aa5b3;--line:#333c47}}body{margin:0;background:var(--paper);"
    'color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}main{max-width:'
    "70rem;margin:0 auto;padding:1.5rem}h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2rem}"
    "div{overflow-x:auto}table{border-collapse:collapse;background:var(--card);font-size:.9rem}"
    "th,td{border:1px solid var(--line);padding:.3rem .6rem;text-align:left;"
    "font-variant-numeric:tabular-nums}img{max-width:100%;background:#fff;border-radius:8px}"
    "figure{margin:1rem 0}figcaption{color:var(--muted);font-size:.9rem}"
)


@dataclass(frozen=True)
class Text:
    """A paragraph of plain text."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of plain text under headings."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Picture:
    """A PNG.

    Attributes:
        name: file name without suffix, for Markdown.
        caption: also what is read to who cannot see it.
        png: the file's bytes.
    """

    name: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: list[Text | Table | Picture] = field(default_factory=list)


def write_markdown(title: str, sections: Sequence[Section], path: str | Path) -> None:
    """Write Markdown, and its pictures into the folder ``<stem>-images`` beside it."""
    path = Path(path)
    folder = f"{path.stem}-images"
    lines = [f"# {_plain(title)}", ""]
    uses: Counter[str] = Counter()
    for section in sections:
        lines += [f"## {_plain(section.title)}", ""]
        for block in section.blocks:
            if isinstance(block, Picture):
                uses[block.name] += 1
                number = f"-{uses[block.name]}" if uses[block.name] > 1 else ""
                name = f"{block.name}{number}.png"
                with whole_file(path.parent / folder / name) as temporary:
                    temporary.write_bytes(block.png)
                lines += [f"![{_plain(block.caption)}]({quote(f'{folder}/{name}')})", ""]
            elif isinstance(block, Table):
                lines += [*_markdown_table(block), ""]
            else:
                lines += [_plain(block.text), ""]
    write_text(path, "\n".join(lines).rstrip() + "\n")


def write_html(title: str, sections: Sequence[Section], path: str | Path) -> None:
    """Write one HTML file that holds its pictures and needs no network."""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">",
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{STYLE}</style>',
        f"</head><body><main><h1>{escape(title)}</h1>",
    ]
    for section in sections:
        parts.append(f"<section><h2>{escape(section.title)}</h2>")
        parts += [_html_block(block) for block in section.blocks]
        parts.append("</section>")
    write_text(path, "\n".join(parts) + "\n</main></body></html>\n")


def _html_block(block: Text | Table | Picture) -> str:
    if isinstance(block, Text):
        return f"<p>{escape(block.text)}</p>"
    if isinstance(block, Picture):
        data, caption = base64.b64encode(block.png).decode(), escape(block.caption)
        image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
    header = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in block.header)
    rows = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in block.rows
    )
    return f"<div><table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table></div>"


def _markdown_table(table: Table) -> list[str]:
    rows = [table.header, ("---",) * len(table.header), *table.rows]
    return ["| " + " | ".join(_plain(cell) for cell in row) + " |" for row in rows]


def _plain(text: str) -> str:
    """Text that stays text: prompts are data."""
    text = " ".join(text.split())
    for sign in "\\`*_[]<>|":
        # Algorithm names are full of underscores, which inside words mean nothing.
        if sign != "_":
            text = text.replace(sign, f"\\{sign}")
    return text
