"""The page of promises names tests that exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
# What users and attackers ran into, by the names of the rows.
KINDS = {
    *("texts", "negative prompts", "given frames", "sizes", "schedules", "experts", "autocast"),
    *("converted checkpoints", "caches of diffusers", "orientation", "depth and colour", "damage"),
    *("one item", "names", "limits", "memory", "places", "compilers", "before work", "log files"),
    *("scripts", "earlier results", "messages", "documents", "pages", "threads", "checksums"),
    *("odd states", "code", "remote code", "size", "blocks", "weights", "claims", "adapters"),
    *("same bytes", "windows", "failed disk", "power cut", "file modes", "time-outs"),
    *("connections", "locks", "log", "uploads", "temporary files", "other sites", "conversion"),
    *("lists", "full disk", "float16", "hostile JSON and YAML", "kill", "libraries"),
}


def test_every_promise_names_tests_that_exist():
    page = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and "| tests |" not in line]
    kinds = {row.split("|")[1].strip() for row in rows}
    assert kinds >= KINDS, KINDS - kinds
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named, row
        for path, name in named:
            tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
            assert name in {node.name for node in tree.body if hasattr(node, "name")}, (path, name)
