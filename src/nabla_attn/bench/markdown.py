"""Tables as Markdown."""

from typing import Any


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table; none without rows."""
    if not rows:
        return []
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines] + [""]


def number_table(
    head: str,
    labels: list[str],
    results: list[dict[str, Any]],
    columns: dict[str, str],
    digits: int,
) -> list[str]:
    """Lines of a Markdown table with a labelled row per result.

    Args:
        head: of the labels.
        labels: of the rows.
        results: numbers by name.
        columns: name of a number -> head of its column.
        digits: behind the point.
    """
    rows = [
        [label, *(f"{result[name]:.{digits}f}" for name in columns)]
        for label, result in zip(labels, results, strict=True)
    ]
    return table([head, *columns.values()], rows)
