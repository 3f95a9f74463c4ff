"""A document of paragraphs, tables, pictures and videos: as Markdown, or as one HTML file."""

import base64
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

from nabla_attn.files import whole_file, write_text

PAGE = Path(__file__).parent / "page"
WITH_PLAYER = ("document", "compare")
"""Pages whose videos play in step."""


@dataclass(frozen=True)
class Text:
    """A paragraph of plain text; one that leads stands out."""

    text: str
    is_lead: bool = False
    kind: ClassVar = "text"


@dataclass(frozen=True)
class Table:
    """Rows of plain text under headings."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    kind: ClassVar = "table"


@dataclass(frozen=True)
class Picture:
    """A PNG.

    Attributes:
        name: File name without suffix, for Markdown.
        caption: Text below the picture, which also stands for it where it cannot be seen.
        png: Bytes of the file.
    """

    name: str
    caption: str
    png: bytes
    kind: ClassVar = "picture"


@dataclass(frozen=True)
class Clip:
    """A video of a row.

    Attributes:
        label: Heading of the video.
        note: Line below the heading.
        mp4: Bytes of the file.
    """

    label: str
    note: str
    mp4: bytes


@dataclass(frozen=True)
class Videos:
    """Videos that play side by side in step. Markdown, which cannot play them, leaves them out."""

    clips: tuple[Clip, ...]
    kind: ClassVar = "videos"


Block = Text | Table | Picture | Videos


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: list[Block] = field(default_factory=list)


def write_markdown(title: str, sections: Sequence[Section], path: str | Path) -> None:
    """Write Markdown, and its pictures into the folder `<stem>-images` beside it."""
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
                rows = [block.header, ("---",) * len(block.header), *block.rows]
                lines += ["| " + " | ".join(map(_plain, row)) + " |" for row in rows] + [""]
            elif isinstance(block, Text):
                lines += [_plain(block.text), ""]
    write_text(path, "\n".join(lines).rstrip() + "\n")


def write_html(title: str, sections: Sequence[Section], path: str | Path) -> None:
    """Write one HTML file that holds its pictures and videos and needs no network."""
    write_text(path, render_page("document", title=title, sections=sections))


def render_page(name: str, **values: Any) -> str:
    """Fill in the template of `page/<name>.html` with its own style and script.

    Args:
        name: Name of the template.
        values: Variables of the template, escaped where they appear.

    Returns:
        A page that needs no other file and runs no script but its own.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    loader = FileSystemLoader(PAGE)
    templates = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    templates.filters["base64"] = lambda content: base64.b64encode(content).decode()
    templates.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    style = _read("colours.css", f"{name}.css")
    script = _read(*("player.js",) * (name in WITH_PLAYER), f"{name}.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    own = {"style": Markup(style), "script": Markup(script), "script_digest": digest}
    return templates.get_template(f"{name}.html").render(own | values)


def _read(*files: str) -> str:
    return "".join((PAGE / file).read_text(encoding="utf-8") for file in files)


def _plain(text: str) -> str:
    """Text that stays text, because prompts are data."""
    # Not the underscores: algorithms have many, which inside words mean nothing.
    return " ".join(text.split()).translate({ord(sign): f"\\{sign}" for sign in "\\`*[]<>|"})
