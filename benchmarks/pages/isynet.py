"""The tables of docs/isynet.md, each between its two marks, from the records and nothing else."""

from pathlib import Path
from typing import Any

from isynet.family import PUBLISHED
from nabla_attn.bench.report import table
from nabla_attn.files import write_text
from nabla_attn.record import RunRecord

RECORD = "isynet_counts.json"
TIMED = "isynet_timed.json"


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
    if (records / TIMED).exists():
        timed = RunRecord.load(records / TIMED)
        text = _replace(page, text, "timed", _timed(timed.numbers["results"][0], timed.device))
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


def _timed(results: dict[str, Any], device: str) -> list[str]:
    """Return what the timed record says, in sentences and a table."""
    lines = [
        f"Device: {device}; one thread, batches of 16 pictures of 224 pixels, CPU seconds. "
        "Other work ran on the second core for part of the time.",
        "",
    ]
    for runtime in ("onnxruntime", "torch"):
        found = results[runtime]
        if found is None:
            continue
        matrix = 1 / found["rates"]["matrix"]
        own = [row for row in found["networks"] if row["family"] == "isynet"]
        best = max(row["macs_per_second"] for row in own) / matrix
        lines += [
            f"- {runtime}: rank correlation of plain MEM with the achieved rate over "
            f"{len(found['networks'])} networks {found['plain_spearman']:.3f}, of timed MEM "
            f"{found['timed_spearman']:.3f}; matrix rate {matrix / 1e9:.1f} GMAC/s, of which the "
            f"quickest ISyNet reaches {best:.1%}; mean error of predicted times of families left "
            f"out of the fit {found['rates']['error']:.1%}.",
        ]
    latency, spaces = results["latency"], results["spaces"]
    lines += [
        f"- Latency table: {len(latency['rows'])} networks that it had not seen are predicted with "
        f"a median error of {latency['median_error']:.1%} (largest {latency['max_error']:.1%}), "
        f"rank correlation {latency['spearman']:.4f}.",
        *(
            f"- MEM of this machine, mean over networks of {row['space']}: {row['mean MEM']:.2f} "
            f"(quantiles 0.1 and 0.9: {row['q0.1']:.2f}, {row['q0.9']:.2f})."
            for row in spaces
        ),
        "",
    ]
    head = ["network", "ms an image", "predicted, ms", "GMAC/s", "plain MEM", "MEM of the machine"]
    networks = results["onnxruntime"]["networks"]
    rows = [
        [
            row["name"],
            f"{row['seconds'] * 1e3:.1f}",
            f"{row['predicted_seconds'] * 1e3:.1f}",
            f"{row['macs_per_second'] / 1e9:.1f}",
            f"{row['plain_mem']:.0f}",
            f"{row['timed_mem']:.2f}",
        ]
        for row in sorted(networks, key=lambda row: -row["macs_per_second"])
    ]
    return [*lines, *table(head, rows)]


TABLES = {"networks": _networks, "mem": _mem, "published": _published, "spaces": _spaces}
