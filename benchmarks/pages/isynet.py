"""The tables of docs/isynet.md, each between its two marks, from the records and nothing else."""

from pathlib import Path
from typing import Any

from isynet.family import PUBLISHED
from nabla_attn.bench.report import table
from nabla_attn.files import write_text
from nabla_attn.record import RunRecord

RECORD = "isynet_counts.json"


def write_tables(page: Path, records: Path) -> None:
    """Write the tables of the page again.

    Args:
        page: The Markdown file, with two marks for each table.
        records: The folder of the records.

    Raises:
        ValueError: The file lacks a mark.
    """
    text = page.read_text(encoding="utf-8")
    record = records / RECORD
    if not record.exists():
        return
    counts = RunRecord.load(record).numbers["results"][0]
    for name, render in TABLES.items():
        text = _replace(page, text, name, render(counts))
    write_text(page, text)


def _replace(page: Path, text: str, name: str, lines: list[str]) -> str:
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if begin not in text or end not in text:
        raise ValueError(f"{page} has no place for the table: it needs {begin} and {end}.")
    head, tail = text.split(begin)[0], text.split(end)[1]
    return head + "\n".join([begin, *lines[:-1], end]) + tail


def _networks(counts: dict[str, Any]) -> list[str]:
    rows = []
    for row in counts["networks"]:
        published = PUBLISHED.get(row["name"])
        rows.append(
            [
                row["name"],
                f"{row['parameters'] / 1e6:.2f}",
                f"{row['macs'] / 1e9:.3f}",
                f"{row['table_macs'] / 1e9:.2f}",
                f"{published.top1:.2f}" if published else "not published",
                f"{published.milliseconds:.2f}" if published else "not published",
            ]
        )
    head = ["network", "parameters, M", "MACs, G", "MACs of the published table, G"]
    return table([*head, "top-1, %", "Ascend 310, ms"], rows)


def _mem(counts: dict[str, Any]) -> list[str]:
    ranked = sorted(counts["networks"] + counts["peers"], key=lambda row: -row["ascend310_mem"])
    rows = [
        [
            row["name"],
            f"{row['macs'] / 1e9:.2f}",
            f"{row['mem']:.0f}",
            f"{row['ascend310_mem']:.2f}",
        ]
        for row in ranked
    ]
    return table(["network", "MACs, G", "plain MEM", "MEM on ascend310"], rows)


def _published(counts: dict[str, Any]) -> list[str]:
    rows = [
        [
            row["name"],
            f"{row['published'] * 1e3:.2f}",
            f"{row['predicted'] * 1e3:.2f}",
            f"{row['error']:+.1%}",
        ]
        for row in counts["published"]
    ]
    return table(["network", "published, ms", "predicted when left out, ms", "error"], rows)


def _spaces(counts: dict[str, Any]) -> list[str]:
    names = ("mean MEM", "q0.1", "q0.5", "q0.9")
    rows = []
    for row in counts["spaces"]:
        digits = 1 if row["machine"] == "plain" else 2
        rows.append([row["space"], row["machine"], *(f"{row[name]:.{digits}f}" for name in names)])
    return table(["space", "MEM", "mean", "quantile 0.1", "median", "quantile 0.9"], rows)


TABLES = {"networks": _networks, "mem": _mem, "published": _published, "spaces": _spaces}
