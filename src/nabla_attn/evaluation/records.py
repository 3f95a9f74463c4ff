"""The records of a run: read from its folder, packed or not, and packed to publish."""

import json
import shutil
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nabla_attn.config import parse
from nabla_attn.evaluation.prompts import Item
from nabla_attn.files import whole_file, write_text
from nabla_attn.record import RunRecord

Records = dict[str, dict[str, RunRecord]]
"""Algorithm -> item -> record."""


def read_records(run: str | Path) -> Records:
    """The records of a run's folder, packed or not, of the items that every algorithm has made.

    Only those compare on the same videos; of others left out there is a warning.

    Raises:
        ValueError: no such records; a broken one is named.
    """
    run = Path(run)
    if not run.is_dir():
        raise ValueError(f"there is no folder {run}. Pass one of `nabla evaluate`.")
    found: Records = defaultdict(dict)
    for record in _load_all(run):
        if record.kind == "evaluate":
            algo, item = _place(record, run)
            found[algo][item.name] = record
    if "dense" not in found:
        raise ValueError(
            f"{run} has no records of `nabla evaluate` with dense attention (those of compare and "
            "generate do not count). Run it first."
        )
    every = set.union(*(set(records) for records in found.values()))
    common = set.intersection(*(set(records) for records in found.values()))
    if not common:
        raise ValueError(f"{run} has no item that all of {', '.join(found)} have made.")
    if left_out := len(every - common):
        warnings.warn(
            f"{run}: {left_out} of {len(every)} items are left out, since not every algorithm has "
            "made them.",
            stacklevel=2,
        )
    return {
        algo: {name: record for name, record in records.items() if name in common}
        for algo, records in found.items()
    }


def _load_all(run: Path) -> Iterator[RunRecord]:
    for path in sorted(run.glob("*/*.json")):
        yield RunRecord.load(path)
    for path in sorted(run.glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                yield RunRecord.from_json(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error


def _place(record: RunRecord, run: Path) -> tuple[str, Item]:
    names = ("sparse_algo", "prompt_index", "prompt")
    algo, index, prompt = (record.config.get(name) for name in names)
    if not (isinstance(algo, str) and isinstance(index, int) and isinstance(prompt, str)):
        raise ValueError(f"{run}: {', '.join(names)} of a record are {algo}, {index}, {prompt}.")
    # Parsed, since it becomes the name of a folder.
    return str(parse(algo)), Item(index, prompt, record.seed)


def measured_items(records: Records, read: Callable[[RunRecord], Any]) -> list[str]:
    """The items with a value in every algorithm that has any value: those compare."""
    found = [
        {item for item, record in items.items() if read(record) is not None}
        for items in records.values()
    ]
    return sorted(set.intersection(*filter(None, found))) if any(found) else []


def pack_run(run: str | Path, target: str | Path) -> int:
    """Write `target/<algorithm>.jsonl`, one record a line, and the videos of the first item.

    `nabla report` and `nabla evaluate summary` read the result as they read `run`.

    Args:
        run: The folder of a run.
        target: The folder of the packed files; algorithms packed there before are replaced.

    Returns:
        The number of items packed.

    Raises:
        ValueError: `run` has no records of dense attention, or no item is complete.
        OSError: a video of the first item is missing, or `target` cannot be written.
    """
    run, target = Path(run), Path(target)
    records = read_records(run)
    names = sorted(records["dense"])
    for algo, items in records.items():
        lines = [json.dumps(asdict(items[name]), allow_nan=False) + "\n" for name in names]
        with whole_file(target / algo / f"{names[0]}.mp4") as temporary:
            shutil.copyfile(run / algo / f"{names[0]}.mp4", temporary)
        write_text(target / f"{algo}.jsonl", "".join(lines))
    return len(names)
