"""Means of a run with paired bootstrap intervals."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from nabla_attn.evaluation.records import Records, measured_items
from nabla_attn.record import RunRecord, collect_versions

NUM_RESAMPLES = 2000


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


METRICS: dict[str, Callable[[RunRecord], float | None]] = {
    "psnr": lambda record: _error(record, "psnr"),
    "ssim": lambda record: _dig(record, ("to_dense", "ssim")),
    "motion_psnr": lambda record: _error(record, "motion_psnr"),
    "motion_ssim": lambda record: _dig(record, ("to_dense", "motion_ssim")),
    "lpips": lambda record: _dig(record, ("to_dense", "lpips")),
    "clip": lambda record: _dig(record, ("to_prompt", "clip")),
    **{
        f"judge_{name}": partial(_dig, keys=("to_prompt", "world", name))
        for name in ("number", "colour", "shape", "direction", "size", "background", "all")
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
