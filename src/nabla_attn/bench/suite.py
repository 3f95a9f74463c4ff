"""The measurements of `nabla bench`, each saved as a record."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nabla_attn.bench.attention import measure_attention, measure_map_share, measure_maps
from nabla_attn.bench.contenders import Baselines
from nabla_attn.bench.scaling import measure_crossover, measure_model, measure_scaling
from nabla_attn.bench.workloads import Workload, workload
from nabla_attn.cost.memory import free_bytes
from nabla_attn.machine import CROSSOVER, crossover_file, device_slug
from nabla_attn.progress import ProgressCallback, ignore_progress
from nabla_attn.record import RunRecord, collect_versions, describe_device

# The most important first, because a budget may end before the last.
GPU_SUITE = ("paper-768p", "wan14b-720p", "wan1.3b-480p", "kandinsky5-10s")
CPU_SUITE = ("toy-cpu", "toy-16k", "map-36k")
MODEL_DENSITIES = (0.1, 0.2)
# A run needs its inputs, copies of them in block order, and the memory of a backend.
MEMORY_FACTOR = 6


@dataclass(frozen=True)
class Job:
    """One measurement: its title, and the function that makes it."""

    title: str
    run: Callable[[], dict[str, Any]]


def jobs(
    work: Workload, device: torch.device, *, rounds: int, baselines: Baselines | None = None
) -> Iterator[Job]:
    """List the measurements of one workload: forward at each density, backward once, the map.

    Raises:
        ValueError: The workload does not fit into memory.
    """
    _check_memory(work, device)
    options: dict[str, Any] = {"rounds": rounds, "baselines": baselines}
    if work.is_map_only:
        density = work.densities[0]
        yield Job(f"{work.name} map", lambda: measure_maps(work, density, device, **options))
        return
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cpu" else (work.dtype,)
    for dtype in dtypes:
        typed = replace(work, dtype=dtype)
        for density in work.densities:
            yield _attention_job(typed, density, device, **options)
        yield _attention_job(typed, work.densities[-1], device, backward=True, **options)
    yield Job(
        f"{work.name} map share",
        lambda: measure_map_share(work, work.densities[-1], device, rounds=rounds),
    )


def _attention_job(
    work: Workload, density: float, device: torch.device, *, backward: bool = False, **options: Any
) -> Job:
    direction = "forward+backward" if backward else "forward"
    dtype = str(work.dtype).removeprefix("torch.")
    return Job(
        f"{work.name} {dtype} density {density} {direction}",
        lambda: measure_attention(work, density, device, backward=backward, **options),
    )


def default_suite(device: torch.device) -> tuple[str, ...]:
    """Return the names of the workloads that suit a device."""
    return GPU_SUITE if device.type == "cuda" else CPU_SUITE


def run_suite(
    names: tuple[str, ...],
    device: torch.device,
    output: Path,
    *,
    rounds: int = 3,
    on_progress: ProgressCallback = ignore_progress,
    budget: float | None = None,
    baselines: Baselines | None = None,
) -> list[Path]:
    """Measure workloads and save one record each under `output`.

    Args:
        names: Names of workloads.
        device: The device to run on.
        output: The folder of the records.
        rounds: Number of timed rounds.
        on_progress: Called with the title of each measurement before it starts.
        budget: Seconds after which no new measurement starts; the record names what was left out.
        baselines: What else is measured.

    Returns:
        The records' paths.

    Raises:
        ValueError: A workload is unknown or does not fit into memory.
    """
    plans = [
        (name, list(jobs(workload(name), device, rounds=rounds, baselines=baselines)))
        for name in names
    ]
    total = sum(len(plan) for _, plan in plans)
    paths: list[Path] = []
    done = 0
    end = None if budget is None else time.monotonic() + budget
    for name, plan in plans:
        results, left_out = [], []
        for job in plan:
            done += 1
            if end is not None and time.monotonic() > end:
                left_out.append(job.title)
                continue
            on_progress(job.title, done - 1, total)
            results.append(job.run())
        config = {"workload": name, "rounds": rounds, "left_out": left_out}
        record = make_record("bench", config, results, device)
        paths.append(output / f"bench_{name}_{device_name(device)}.json")
        record.save(paths[-1])
    return paths


def run_shapes(
    kinds: Iterable[str],
    device: torch.device,
    output: Path,
    *,
    rounds: int = 3,
    num_layers: int | None = None,
    on_progress: ProgressCallback = ignore_progress,
) -> Iterator[Path]:
    """Measure the kinds that have shapes of their own, and save one record each under `output`.

    Args:
        kinds: Kinds of records: "bench-scaling", time against tokens; "bench-crossover", from which
            length on sparse wins, saved for this machine too; "bench-model", a whole transformer.
        device: The device to run on.
        output: The folder of the records.
        rounds: Number of timed rounds.
        num_layers: Number of the transformer's layers; None takes those of its shape.
        on_progress: Called with the title of each measurement before it starts.

    Yields:
        The path of each record.
    """
    for kind in kinds:
        config: dict[str, Any] = {"rounds": rounds}
        if kind == "bench-model":
            config["layers"] = num_layers
            results = _measure_models(device, num_layers, rounds, on_progress)
        else:
            measure = measure_scaling if kind == "bench-scaling" else measure_crossover
            results = measure(device, rounds=rounds, on_progress=on_progress)
        record = make_record(kind, config, results, device)
        path = output / f"{kind.replace('-', '_')}.json"
        record.save(path)
        if kind == CROSSOVER:
            record.save(crossover_file(device))
        yield path


def _measure_models(
    device: torch.device, num_layers: int | None, rounds: int, on_progress: ProgressCallback
) -> list[dict[str, Any]]:
    results = []
    for index, density in enumerate(MODEL_DENSITIES):
        on_progress(f"a transformer at density {density}", index, len(MODEL_DENSITIES))
        results.append(measure_model(device, density, num_layers=num_layers, rounds=rounds))
    return results


def make_record(
    kind: str, config: dict[str, Any], results: list[dict[str, Any]], device: torch.device
) -> RunRecord:
    """Make a record of measurements and of the environment they were made in."""
    return RunRecord(
        kind=kind,
        config=config,
        seed=0,
        versions=collect_versions(),
        device=describe_device(device),
        numbers={"results": results},
    )


def device_name(device: torch.device) -> str:
    """Return the device as record names have it, where all CPUs share one name."""
    return "cpu" if device.type == "cpu" else device_slug(device)


def _check_memory(work: Workload, device: torch.device) -> None:
    free = free_bytes(device)
    # On a CPU, float32 is measured too.
    widening = 4 // work.dtype.itemsize if device.type == "cpu" else 1
    wanted = MEMORY_FACTOR * work.input_bytes() * widening
    if wanted > free:
        raise ValueError(
            f"workload {work.name} needs about {wanted / 2**30:.0f} GiB on {device}: "
            f"{free / 2**30:.0f} GiB are free. Choose a smaller one."
        )
