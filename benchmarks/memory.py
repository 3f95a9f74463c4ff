"""Peaks of memory of whole runs on a CPU, each in a process of its own, beside their estimates.

`python -m benchmarks.memory` writes `benchmarks/results/memory.json`. A peak is the most that
glibc has given out at once, less what it had after an earlier run, and the weights: tensors, arrays
and scratch memory that are alive, without libraries, and without what was freed and kept. Other
load does not change it.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer

from nabla_attn.cost.memory import MemoryEstimate
from nabla_attn.generation.generate import generate
from nabla_attn.generation.memory import estimate_memory
from nabla_attn.generation.pipeline import BUILTIN_DIRECTORY, load_pipeline
from nabla_attn.generation.request import GenerationRequest
from nabla_attn.moving_shapes.dataset import WorldSet
from nabla_attn.record import RunRecord, collect_versions, describe_device
from nabla_attn.training.memory import estimate_training
from nabla_attn.training.model import load_parts
from nabla_attn.training.recipes import read_config
from nabla_attn.training.setup import prepare
from nabla_attn.training.trainer import Trainer

RESULT = Path(__file__).parent / "results" / "memory.json"
CPU = torch.device("cpu")
NAMES = ("work", "model", "frames", "height", "width", "sparse_algo", "options")
CASES = (
    ("generate", "builtin", 61, 128, 128, "nabla-0.2_sta-3-3-3", ()),
    ("generate", "builtin", 29, 128, 128, "dense", ()),
    ("generate", "wan", 17, 256, 256, "nabla-0.5", ()),
    ("generate", "cogvideox", 17, 128, 192, "nabla-0.5", ()),
    ("generate", "ltx", 17, 128, 192, "nabla-0.5", ()),
    ("train", "builtin", 29, 64, 64, "nabla-0.5", ("data.batch=2",)),
    ("train", "builtin", 29, 64, 64, "nabla-0.5", ("gradient_checkpointing=true",)),
)
MALLINFO2 = (
    *("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks"),
    *("fordblks", "keepcost"),
)


@dataclass
class Work:
    """Something whose memory is estimated and measured.

    Attributes:
        estimate: What is foreseen.
        load: Loads weights, which may stay in mapped files; gives them and what to measure.
    """

    estimate: MemoryEstimate
    load: Callable[[], tuple[list[torch.nn.Module], Callable[[], Any]]]

    def run(self) -> int:
        """Bytes of the weights, and the most that is allocated beside them."""
        parts, run = self.load()
        weights = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
        with allocated_peak() as found:
            run()
        return weights + found[0]


def measure(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A case with its estimate and the most bytes that this process holds for it."""
    directory = model_folder(case["model"], folder)
    work = {"generate": video_of, "train": training_of}[case["work"]](case, directory, folder)
    work.run()  # what libraries import, compile and keep is not counted
    gc.collect()
    return case | {"measured": work.run(), "estimate": work.estimate.to_dict()}


def model_folder(model: str, folder: Path) -> Path:
    """The directory of a model of `CASES`; tiny ones are written with random weights."""
    if model == "builtin":
        return BUILTIN_DIRECTORY
    from tests.tiny_diffusers import tiny_wan_pipeline
    from tests.training import tiny_pipelines

    place = folder / model
    if model == "wan":
        tiny_wan_pipeline(place, rope_max_seq_len=1024)
    else:
        getattr(tiny_pipelines, model)().save_pretrained(place)
    return place


def video_of(case: dict[str, Any], directory: Path, folder: Path) -> Work:
    """A video of two steps; further ones hold nothing more."""
    size = {name: case[name] for name in ("frames", "height", "width", "sparse_algo")}
    request = GenerationRequest("red", steps=2, guidance=3.0, **size)

    def load() -> Any:
        pipeline = load_pipeline(directory, device="cpu", dtype="float32")
        parts = [x for x in pipeline.components.values() if isinstance(x, torch.nn.Module)]
        return parts, partial(generate, pipeline, request)

    return Work(estimate_memory(directory, request, device=CPU, dtype=torch.float32), load)


def training_of(case: dict[str, Any], directory: Path, folder: Path) -> Work:
    """A run of training of two steps."""
    size = {name: case[name] for name in ("frames", "height", "width")}
    data = WorldSet(load_pipeline(directory, device="cpu"), clips=4, **size)
    overrides = [
        f"model={case['model']}",
        "steps=2",
        "data.validation=1",
        f"sparsity.algorithm={case['sparse_algo']}",
    ]
    config = read_config("finetune", [*overrides, *case["options"]], None)

    def load() -> Any:
        run = prepare(config, load_parts(directory), data)
        place = Path(tempfile.mkdtemp(dir=folder))
        return [run.bare], Trainer(run, place).fit

    return Work(estimate_training(prepare(config, load_parts(directory), data)), load)


@contextmanager
def allocated_peak() -> Iterator[list[int]]:
    """Yield a list to which the most that glibc has given out at once is added, beside what it had.

    It is looked up every millisecond.
    """
    found: list[int] = []
    is_over = threading.Event()
    began = allocated()

    def watch() -> None:
        peak = began
        while not is_over.wait(0.001):
            peak = max(peak, allocated())
        found.append(peak - began)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        is_over.set()
        watcher.join()


class MallocInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in MALLINFO2)


def allocated() -> int:
    """Bytes that glibc has given out and not had back, in all its arenas."""
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = MallocInfo
    info = ask()
    return int(info.hblkhd + info.uordblks)


def main() -> None:
    """Measure one case for another process, or write the record of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", type=int, help="print the row of one case")
    index = parser.parse_args().case
    if index is not None:
        case = dict(zip(NAMES, CASES[index], strict=True))
        with tempfile.TemporaryDirectory() as folder:
            typer.echo(json.dumps(measure(case, Path(folder))))
        return
    rows = []
    for index in range(len(CASES)):
        command = [sys.executable, "-m", "benchmarks.memory", "--case", str(index)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        typer.echo(done.stdout.splitlines()[-1])
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    record = RunRecord(
        kind="memory",
        config={"dtype": "float32", "device": "cpu"},
        seed=0,
        versions=collect_versions(),
        device=describe_device(CPU),
        numbers={"cases": rows},
    )
    record.save(RESULT)


if __name__ == "__main__":
    main()
