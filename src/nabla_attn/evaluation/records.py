"""The records of a run: read from its folder, packed to publish, and summarised.

Means have paired bootstrap intervals.
"""

import json
import math
import shutil
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nabla_attn.config import parse
from nabla_attn.evaluation.prompts import Item
from nabla_attn.files import whole_file, write_text
from nabla_attn.record import RunRecord, collect_versions

Records = dict[str, dict[str, RunRecord]]
"""Algorithm -> item -> record."""

COLUMNS = {
    "density": ("pairs kept", "{:.1%}"),
    "seconds": ("seconds", "{:.2f}"),
    "psnr": ("PSNR", "{:.1f}"),
    "ssim": ("SSIM", "{:.4f}"),
    "lpips": ("LPIPS", "{:.4f}"),
    "judge_all": ("all right", "{:.0%}"),
    "clip": ("CLIP", "{:.2f}"),
    "true_mass": ("true mass", "{:.1%}"),
    "best_mass": ("at best", "{:.1%}"),
}
"""Measure -> heading, and how its mean is written."""


def read_records(run: str | Path) -> Records:
    """The records of a run's folder, packed or not, of the items that every algorithm has made.

    Only those compare on the same videos; of others left out there is a warning.

    Raises:
        ValueError: No such records; a broken one is named.
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
        OSError: A video of the first item is missing, or `target` cannot be written.
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


NUM_RESAMPLES = 2000


def judge_version(records: Records) -> str:
    """Version of the built-in world's judge in records of one run; the first had no name."""
    found = {
        str(record.config.get("world_judge", "1"))
        for items in records.values()
        for record in items.values()
        if _dig(record, ("to_prompt", "world", "all")) is not None
    }
    return ", ".join(sorted(found))


def _dig(record: RunRecord, keys: tuple[str, ...]) -> float | None:
    value: Any = record.numbers
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return None if value is None else float(value)


def _error(record: RunRecord, key: str) -> float | None:
    """Squared error over the squared peak: decibels have no mean where a video is identical."""
    to_dense = record.numbers["to_dense"]
    if key not in to_dense:
        return None
    value = to_dense[key]
    if value is None:
        is_single = key == "motion_psnr" and to_dense.get("motion_ssim") is None
        return None if is_single else 0.0
    return float(10 ** (-value / 10))


FACTS = ("number", "colour", "shape", "direction", "size", "background")
LOOKS = ("outline", "outline_min", "holes", "fragments", "stains")
"""What the judge of the built-in world says of a video, and what it measures in it."""

METRICS: dict[str, Callable[[RunRecord], float | None]] = {
    "psnr": lambda record: _error(record, "psnr"),
    "ssim": lambda record: _dig(record, ("to_dense", "ssim")),
    "motion_psnr": lambda record: _error(record, "motion_psnr"),
    "motion_ssim": lambda record: _dig(record, ("to_dense", "motion_ssim")),
    "lpips": lambda record: _dig(record, ("to_dense", "lpips")),
    "clip": lambda record: _dig(record, ("to_prompt", "clip")),
    **{
        f"judge_{name}": partial(_dig, keys=("to_prompt", "world", name))
        for name in (*FACTS, "all", *LOOKS)
    },
    "density": lambda record: _dig(record, ("attention", "density")),
    "seconds": lambda record: _dig(record, ("seconds", "transformer")),
    "memory_bytes": lambda record: _dig(record, ("memory_bytes",)),
    # Not "density": the probed items are fewer.
    "probe_density": lambda record: _dig(record, ("probe", "density")),
    **{
        name: partial(_dig, keys=("probe", name))
        for name in ("kept_mass", "true_mass", "best_mass", "output_error")
    },
}
"""Name -> the value of one record; PSNR as squared error, turned into decibels after the mean."""

DECIBELS = ("psnr", "motion_psnr")
MEDIANS = ("seconds",)
"""Metrics that are no means: whatever else a machine does only ever makes a run slower."""


def summarise(records: Records) -> dict[str, dict[str, Any]]:
    """Mean, 95 % interval and difference to dense of every metric of every algorithm.

    Of `MEDIANS` it is the median, and that of the differences. Each metric is over the items of
    `measured_items`.

    Intervals resample prompts (all seeds of a prompt go together), the same draws for all
    algorithms; differences are taken pair by pair within each draw.

    Returns:
        algorithm -> metric -> {"value", "low", "high", "count", "difference": [value, low, high]},
        dense first.
    """
    dense = records["dense"]
    order = ["dense", *sorted(algo for algo in records if algo != "dense")]
    items = {name: measured_items(records, read) for name, read in METRICS.items()}
    return {
        algo: {
            name: _summarise_metric(name, items[name], records[algo], dense)
            for name, read in METRICS.items()
            if any(read(records[algo][item]) is not None for item in items[name])
        }
        for algo in order
    }


def summary_record(records: Records) -> RunRecord:
    """The summary as a record, with the settings all of its runs share."""
    first = next(iter(records["dense"].values()))
    config = {
        key: value
        for key, value in first.config.items()
        if key not in ("prompt", "seed", "sparse_algo", "prompt_index", "schedule")
    }
    config["items"] = sorted(records["dense"])
    return RunRecord(
        kind="evaluation",
        config=config,
        seed=0,
        versions=collect_versions(),
        device=first.device,
        numbers={"algorithms": summarise(records)},
    )


def resample(groups: Mapping[str, list[int]]) -> list[np.ndarray]:
    """Bootstrap draws: the items of as many prompts as there are, drawn with replacement."""
    names = sorted(groups)
    rng = np.random.default_rng(0)
    members = [np.array(groups[name]) for name in names]
    picks = rng.integers(len(names), size=(NUM_RESAMPLES, len(names)))
    return [np.concatenate([members[i] for i in pick]) for pick in picks]


def _summarise_metric(
    name: str, items: Sequence[str], ours: dict[str, RunRecord], dense: dict[str, RunRecord]
) -> dict[str, Any]:
    read = METRICS[name]
    values = np.array([read(ours[item]) for item in items], dtype=float)
    base = [read(dense[item]) for item in items]
    is_paired = all(value is not None for value in base) and name not in DECIBELS
    differences = values - np.array(base, dtype=float) if is_paired else None
    groups: dict[str, list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        groups[str(ours[item].config["prompt"])].append(index)
    draws = resample(groups) if len(groups) > 1 else []
    convert = _to_decibels if name in DECIBELS else float
    centre = np.median if name in MEDIANS else np.mean
    low, high = _interval([convert(centre(values[draw])) for draw in draws])
    entry: dict[str, Any] = {
        "value": _plain(convert(centre(values))),
        "low": low,
        "high": high,
        "count": len(items),
        "prompts": len(groups),
    }
    if differences is not None:
        spread = _interval([float(centre(differences[draw])) for draw in draws])
        entry["difference"] = [_plain(float(centre(differences))), *spread]
    return entry


def _to_decibels(error: float) -> float:
    return -10 * math.log10(error) if error > 0 else math.inf


def _interval(values: list[float]) -> list[float | None]:
    if not values:
        return [None, None]
    ordered = np.sort(values)
    # Not interpolated: between an infinite and a finite value there is nothing.
    indices = (int(0.025 * (len(values) - 1)), math.ceil(0.975 * (len(values) - 1)))
    return [_plain(float(ordered[index])) for index in indices]


def _plain(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


def means_table(algorithms: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a summary's means; the report and summary.json have the intervals."""
    shown = [name for name in COLUMNS if any(name in entry for entry in algorithms.values())]
    header = ["algorithm", *(COLUMNS[name][0] for name in shown), "videos"]
    rows = []
    for algo, entry in algorithms.items():
        values = [entry.get(name, {}).get("value") for name in shown]
        cells = [
            "" if value is None else COLUMNS[name][1].format(value)
            for name, value in zip(shown, values, strict=True)
        ]
        rows.append([algo, *cells, str(entry["ssim"]["count"])])
    return header, rows
