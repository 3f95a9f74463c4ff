"""The list of docs/methods.md: a row for each sparse attention method of the package."""

from pathlib import Path

from nabla_attn.files import write_text
from nabla_attn.methods import NAMES, find
from nabla_attn.methods.contract import Method

BEGIN, END = "<!-- list: begin -->", "<!-- list: end -->"
EXACT = {"code": "the code", "paper": "the paper", "reconstructed": "reconstructed"}


def write_list(page: Path) -> None:
    """Write the list anew between its marks."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    write_text(page, f"{before}{BEGIN}\n{build_list()}\n{END}{after}")


def build_list() -> str:
    """Return the table of methods and, below it, where each is from."""
    methods = [find(name) for name in NAMES]
    table = [
        "| method | what it is | kind | exact to | gradients | needs |",
        "|---|---|---|---|---|---|",
    ]
    table += [_row(method) for method in methods]
    return "\n".join([*table, "", *map(_source, methods)])


def _row(method: Method) -> str:
    cells = [
        f"`{method.form}`",
        method.title,
        method.kind,
        EXACT[method.exactness],
        "yes" if method.is_trainable else "no",
        ", ".join(method.needs),
    ]
    return f"| {' | '.join(cells)} |"


def _source(method: Method) -> str:
    parts = [f"- `{method.name}`: {method.paper}"]
    if method.code:
        parts.append(f"code {method.code} ({method.licence or 'no licence stated'})")
    if method.published:
        parts.append(f"as published `{method.published}`")
    line = "; ".join(parts) + "."
    return f"{line} Ours: {method.ours.rstrip('.')}." if method.ours else line
