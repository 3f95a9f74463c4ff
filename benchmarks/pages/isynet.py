"""The tables of docs/isynet.md, each between its two marks, from the records and nothing else."""

from pathlib import Path
from typing import Any

from isynet.family import PUBLISHED
from nabla_attn.bench.report import table
from nabla_attn.files import write_text
from nabla_attn.record import RunRecord

RECORD = "isynet_counts.json"
TIMED = "isynet_timed_*.json"
"""Records of `benchmarks.isynet_timed`, one of each machine."""
FOLDER = "isynet"
"""Folder of the records that `isynet search` and `isynet bench` wrote themselves."""


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
    timed = [RunRecord.load(path) for path in sorted(records.glob(TIMED))]
    if timed:
        text = _replace(page, text, "timed", _timed(timed))
    for name, render_record in STUDIES.items():
        if (records / FOLDER / f"{name}.json").exists():
            study = RunRecord.load(records / FOLDER / f"{name}.json")
            text = _replace(page, text, name, render_record(study))
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


def _timed(records: list[RunRecord]) -> list[str]:
    """Return what the timed records say, in sentences and a table."""
    lines, columns = [], []
    for record in records:
        results = record.numbers["results"][0]
        lines += [
            f"{record.device}, {record.created[:10]}; one thread, batches of 16 pictures of 224 "
            "pixels, CPU seconds. Other work ran on the second core for part of the time.",
            "",
        ]
        for runtime in ("onnxruntime", "torch"):
            if results[runtime] is not None:
                lines.append(_runtime(runtime, results[runtime]))
                columns.append((f"{record.device.split(' (')[0]}, {runtime}", results[runtime]))
        latency = results["latency"]
        lines += [
            f"- Latency table: {len(latency['rows'])} networks that it had not seen are predicted "
            f"with a median error of {latency['median_error']:.1%} (largest "
            f"{latency['max_error']:.1%}), rank correlation {latency['spearman']:.4f}.",
            "",
        ]
    rates = [
        {row["name"]: row["macs_per_second"] for row in found["networks"]} for _, found in columns
    ]
    rows = [
        [
            row["name"],
            f"{row['plain_mem']:.0f}",
            *(f"{rate[row['name']] / 1e9:.1f}" for rate in rates),
        ]
        for row in sorted(columns[0][1]["networks"], key=lambda row: -row["plain_mem"])
    ]
    head = ["network", "plain MEM", *(f"GMAC/s: {name}" for name, _ in columns)]
    return [*lines, *table(head, rows)]


def _runtime(name: str, found: dict[str, Any]) -> str:
    matrix = 1 / found["rates"]["matrix"]
    own = [row for row in found["networks"] if row["family"] == "isynet"]
    best = max(row["macs_per_second"] for row in own) / matrix
    spaces = "; of ".join(
        f"{row['space']} {row['mean MEM']:.2f} (quantiles 0.1 and 0.9: {row['q0.1']:.2f}, "
        f"{row['q0.9']:.2f})"
        for row in found["spaces"]
    )
    return (
        f"- {name}: rank correlation of plain MEM with the achieved rate over "
        f"{len(found['networks'])} networks {found['plain_spearman']:.3f}, of timed MEM "
        f"{found['timed_spearman']:.3f}; fitted matrix rate {matrix / 1e9:.1f} GMAC/s, of which "
        f"the quickest ISyNet reaches {best:.1%}; mean error of predicted times of families left "
        f"out of the fit {found['rates']['error']:.1%}. Mean MEM of networks of {spaces}."
    )


def _search(record: RunRecord) -> list[str]:
    """Return the best of a search, and how many it tried."""
    candidates = record.numbers["candidates"]
    low, high = (1e3 * seconds for seconds in record.config["latency"])
    plan, recipe = record.config["plan"], record.config["recipe"]
    lengths = [recipe["steps"] * plan["growth"] ** rung for rung in range(plan["rungs"])]
    lines = [
        f"{len(candidates)} networks of {low:.3g} to {high:.3g} ms were trained, for "
        f"{' or '.join(map(str, lengths))} steps of {recipe['batch']} images. The best by "
        f"{plan['validation']} images held out, {record.device}:",
        "",
    ]
    rows = [
        [
            f"`{row['architecture']}`",
            str(lengths[row["rung"]]),
            f"{100 * row['accuracy']:.1f}",
            f"{1e3 * row['seconds']:.3f}",
        ]
        for row in candidates[:5]
    ]
    return [*lines, *table(["network", "steps", "accuracy, %", "predicted, ms"], rows)]


def _about(record: RunRecord) -> str:
    recipe, seeds = record.config["recipe"], record.config["seeds"]
    images = recipe["steps"] * recipe["batch"]
    return f"{images:,} training images, {seeds} seeds, {record.device}."


def _lead(mean: float, error: float) -> str:
    return f"{100 * mean:+.2f} ± {100 * error:.2f}"


def _peers(record: RunRecord) -> list[str]:
    """Return networks of equal latency, best first."""
    rows = [
        [
            f"`{row['network']}`" if "ahead" in row else row["network"],
            f"{1e3 * row['seconds']:.3f}",
            f"{100 * row['accuracy']:.2f}",
            ", ".join(f"{100 * value:.1f}" for value in row["accuracies"]),
            _lead(row["ahead"], row["ahead_error"]) if "ahead" in row else "",
        ]
        for row in record.numbers["rows"]
    ]
    head = ["network", "measured, ms", "accuracy, %", "of the seeds", "ahead of the best other"]
    return [_about(record), "", *table(head, rows)]


def _scaling(record: RunRecord) -> list[str]:
    """Return networks scaled by gain beside those deepened evenly."""
    rows = []
    for row in record.numbers["rows"]:
        for kind in ("scaled", "even"):
            each = row[kind]
            rows.append(
                [
                    f"{1e3 * row['budget']:.3g}",
                    "by gains" if kind == "scaled" else "evenly",
                    f"`{each['architecture']}`",
                    f"{1e3 * each['predicted']:.3f}",
                    f"{1e3 * each['measured']:.3f}",
                    f"{100 * each['accuracy']:.2f}",
                    _lead(row["ahead"], row["ahead_error"]) if kind == "scaled" else "",
                ]
            )
    head = ["at most, ms", "deepened", "network", "predicted, ms", "measured, ms", "accuracy, %"]
    base = f"Scaled from `{record.config['base']}`; {_about(record)}"
    return [base, "", *table([*head, "ahead"], rows)]


def _downstream(record: RunRecord) -> list[str]:
    """Return networks of equal latency at three tasks."""
    plan = record.config["plan"]
    lines = [
        f"Features learnt from {plan['train']['steps'] * plan['train']['batch']:,} images, "
        f"{plan['shots']} digits of each class to fine-tune on, detectors trained for "
        f"{plan['detect']['steps']} steps of {plan['detect']['batch']} images, {plan['seeds']} "
        f"seeds, {record.device}. Differences are from the best other network in that column:",
        "",
    ]
    rows = []
    for row in record.numbers["rows"]:
        cells = [f"`{row['network']}`" if "ahead" in row else row["network"]]
        cells.append(f"{1e3 * row['seconds']:.3f}")
        for name in ("accuracy", "transfer", "ap50"):
            ahead = row.get("ahead", {}).get(name)
            lead = f" ({_lead(ahead['mean'], ahead['error'])})" if ahead else ""
            cells.append(f"{100 * row[name]:.2f}{lead}")
        rows.append(cells)
    head = ["network", "measured, ms", "scenes, accuracy, %", "digits, accuracy, %"]
    return [*lines, *table([*head, "boxes, AP50, %"], rows)]


def _attention(record: RunRecord) -> list[str]:
    """Return what a budget of seconds chose for attention, predicted and measured."""
    config = record.config
    rows = [
        [
            row["name"],
            f"{row['predicted']:.2f}",
            f"{row['measured']:.2f}",
            f"{row['measured'] / row['predicted'] - 1:+.1%}",
            f"{row['density']:.3f}",
            f"{row['error']:.4f}",
        ]
        for row in record.numbers["results"]
    ]
    lines = [
        f"The first built-in model, {config['frames']} frames, {config['speed_up']:g} times the "
        f"speed of dense attention asked for, CPU seconds of one thread, {record.device}:",
        "",
    ]
    head = ["schedule", "predicted, s", "measured, s", "off by", "density", "error"]
    return [*lines, *table(head, rows)]


STUDIES = {
    "attention": _attention,
    "search": _search,
    "twin": _search,
    "peers": _peers,
    "scaling": _scaling,
    "downstream": _downstream,
}

TABLES = {"networks": _networks, "mem": _mem, "published": _published, "spaces": _spaces}
