"""Pages of the documentation site that are made when it is built, for MkDocs.

The home page is the README, tutorials come from scripts that run, and the command reference from
the commands themselves.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
# Page of the site -> its source in the repository.
ELSEWHERE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
    "comfyui.md": "comfyui/README.md",
}
SCRIPTS = sorted((ROOT / "docs/tutorials").glob("*.py"))
COMMANDS = "reference/commands.md"
VERB_LIST = re.compile(r"\*\*Commands\*\*:\n\n(?:\* .*\n)+\n?")
LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)#\s]+)")


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    for page, source in ELSEWHERE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=move_links(text, source, page)))
    for script in SCRIPTS:
        content = script_page(script.read_text(encoding="utf-8"))
        files.append(File.generated(config, f"tutorials/{script.stem}.md", content=content))
    files.append(File.generated(config, COMMANDS, content=command_reference()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links to files outside of docs/ find their pages."""
    name = page.file.src_uri
    return markdown if name in ELSEWHERE else move_links(markdown, f"docs/{name}", name)


def move_links(text: str, source: str, page: str) -> str:
    """Rewrite the relative links of a file of the repository for its page of the site.

    Args:
        text: Markdown.
        source: The file's path in the repository.
        page: The page's path in the site.
    """
    pages = {source: page for page, source in ELSEWHERE.items()}
    pages |= {f"docs/tutorials/{path.name}": f"tutorials/{path.stem}.md" for path in SCRIPTS}

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        inside = pages.get(target) or target.removeprefix("docs/")
        return posixpath.relpath(inside, posixpath.dirname(page) or ".")

    return LINK.sub(moved, text)


def script_page(script: str) -> str:
    """A script in cells, as editors run them (`# %%` and `# %% [markdown]`), as Markdown."""
    parts = []
    for cell in re.split(r"^# %%", script, flags=re.MULTILINE)[1:]:
        kind, _, body = cell.partition("\n")
        if kind.strip() == "[markdown]":
            parts.append(re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE))
        else:
            parts.append(f"```python\n{body.strip()}\n```")
    return "\n\n".join(parts) + "\n"


def command_reference() -> str:
    """`nabla --help` and the help of every verb, as Markdown."""
    from typer.cli import get_docs_for_click
    from typer.main import get_command

    from nabla_attn.cli import app

    command = get_command(app)
    with command.make_context("nabla", ["--help"], resilient_parsing=True) as context:
        text = get_docs_for_click(obj=command, ctx=context, name="nabla", title="Commands")
    # Its lists of verbs cut each sentence short; the page's own contents list the verbs.
    return VERB_LIST.sub("", text)
