"""Latency on this machine: of whole networks, or summed from a table of measured blocks."""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from isynet.architecture import Architecture, Stage
from isynet.network import Edge, Head, ISyNet, fuse_edges, make_stage
from isynet.onnx_file import open_session, write_onnx
from nabla_attn.cost.timing import time_loops
from nabla_attn.files import read_json, write_text

RUNTIMES = ("onnxruntime", "torch")
FORMAT = 1
FACTOR_NETWORKS = 5
"""Networks that a table's factor is fitted to before it is used."""

MAX_BYTES = 2**26

Timer = Callable[[Mapping[str, nn.Module], tuple[int, ...]], dict[str, float]]
"""Modules that take one input of a shape -> seconds of a call of each, timed in turn."""


def make_timer(runtime: str = "onnxruntime", *, rounds: int = 8, threads: int = 1) -> Timer:
    """A timer of modules on the CPU: least CPU seconds of a few rounds.

    Args:
        runtime: `onnxruntime`, or `torch` in channels-last format.
        rounds: Rounds in which all modules are timed in turn.
        threads: Threads of onnxruntime; PyTorch's are set by the user.

    Raises:
        ValueError: An unknown runtime.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f"unknown runtime {runtime[:40]!r}. Known: {', '.join(RUNTIMES)}.")

    def measure(modules: Mapping[str, nn.Module], shape: tuple[int, ...]) -> dict[str, float]:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        make = _onnx_run if runtime == "onnxruntime" else _torch_run
        runs = {name: make(module.eval(), x, threads) for name, module in modules.items()}
        timings = time_loops(runs, rounds=rounds)
        return {name: timing.least for name, timing in timings.items()}

    return measure


def _torch_run(module: nn.Module, x: torch.Tensor, threads: int) -> Callable[[], object]:
    module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = x.contiguous(memory_format=torch.channels_last)

    def run() -> object:
        with torch.inference_mode():
            return module(x)

    return run


def _onnx_run(module: nn.Module, x: torch.Tensor, threads: int) -> Callable[[], object]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "module.onnx"
        write_onnx(module, path, x)
        session = open_session(path.read_bytes(), threads)
    images = {"images": x.numpy()}
    return lambda: session.run(None, images)


@dataclass(frozen=True)
class Conditions:
    """What a latency depends on beside the architecture.

    Attributes:
        size: Pixels of the images' sides.
        batch: Images of a batch.
        in_chans: Channels of the images.
        num_classes: Number of classes.
        runtime: `onnxruntime` or `torch`.
        threads: Threads of the runtime.
    """

    size: int
    batch: int = 16
    in_chans: int = 3
    num_classes: int = 10
    runtime: str = "onnxruntime"
    threads: int = 1


@dataclass
class LatencyTable:
    """Seconds of blocks, measured once and kept; a network's latency is their sum.

    The first block of a stage and one more block of it are timed in short chains, with what the
    chains share subtracted. What runs in a whole network runs a little faster than in pieces, so
    sums are multiplied by one factor, fitted to a few whole networks.

    Attributes:
        conditions: What the seconds hold for.
        timer: What measures; `make_timer` of the conditions' runtime by default.
        path: File that is written after each measurement; None keeps them in memory.
        entries: Seconds an image of each piece.
        factor: Seconds of whole networks over the sums of their pieces; None until it is fitted.
    """

    conditions: Conditions
    timer: Timer | None = None
    path: Path | None = None
    entries: dict[str, float] = field(default_factory=dict)
    factor: float | None = None

    def __post_init__(self) -> None:
        if self.timer is None:
            now = self.conditions
            self.timer = make_timer(now.runtime, threads=now.threads)
        if self.path and self.path.is_file():
            self._load(self.path)

    def seconds(self, architecture: Architecture) -> float:
        """Seconds an image of a whole network, from the table; missing pieces are measured."""
        pieces = self.pieces(architecture)
        counts = architecture.num_blocks
        total = sum(first + (n - 1) * more for (first, more), n in zip(pieces, counts, strict=True))
        return self.scale * (total + self._head(architecture))

    @property
    def scale(self) -> float:
        """The factor, or 1 before it is fitted."""
        return 1.0 if self.factor is None else self.factor

    def pieces(self, architecture: Architecture) -> list[tuple[float, float]]:
        """Seconds an image of each stage's first block and of one more, before `factor`."""
        result = []
        inputs, size = self.conditions.in_chans, self.conditions.size
        for index, stage in enumerate(architecture.stages):
            channels = architecture.channels[index]
            first = self._entry(f"first {_key(stage)}", index, stage, inputs, size)
            size = -(-size // 2)
            # One block more is asked for stages of one block too: scaling adds it.
            more = self._entry(f"more {_key(stage)}", index, stage, channels, size)
            result.append((first, more))
            inputs = channels
        return result

    def measure(self, architecture: Architecture) -> float:
        """Seconds an image of a whole network, measured now."""
        net = ISyNet(architecture, self.conditions.num_classes, self.conditions.in_chans)
        return self.measure_module(net.fused())

    def measure_module(self, module: nn.Module) -> float:
        """Seconds an image of any module that takes the images, measured now."""
        return self._time({"net": module}, self.conditions.in_chans, self.conditions.size)["net"]

    def fit_factor(self, architectures: list[Architecture]) -> list[float]:
        """Measure whole networks and set the factor to the median of their ratios.

        Returns:
            Relative error of each network's predicted seconds, with the new factor.
        """
        self.factor = None
        ratios = np.array([self.measure(each) / self.seconds(each) for each in architectures])
        self.factor = float(np.median(ratios))
        self._save()
        return [float(value) for value in self.factor / ratios - 1]

    def _entry(self, kind: str, index: int, stage: Stage, inputs: int, size: int) -> float:
        key = f"{kind} at {index}, {inputs}x{size}"
        if key not in self.entries:
            make = self._measure_first if kind.startswith("first") else self._measure_more
            self.entries[key] = make(index, stage, inputs, size)
            # Kept before it is used, so that a search that is killed decides the same again.
            self._save()
        return self.entries[key]

    def _measure_first(self, index: int, stage: Stage, inputs: int, size: int) -> float:
        block = _fused_blocks(index, stage, inputs, 1)
        if index == 0:
            return self._time({"block": block}, inputs, size)["block"]
        entry = _entry_conv(inputs)
        times = self._time({"both": nn.Sequential(entry, block), "entry": entry}, inputs, size)
        return max(times["both"] - times["entry"], 0.0)

    def _measure_more(self, index: int, stage: Stage, channels: int, size: int) -> float:
        _, *more = _fused_blocks(index, stage, channels, 4)
        entry = _entry_conv(channels)
        chains = {"three": nn.Sequential(entry, *more), "one": nn.Sequential(entry, more[0])}
        times = self._time(chains, channels, size)
        return max((times["three"] - times["one"]) / 2, 0.0)

    def _head(self, architecture: Architecture) -> float:
        channels, width = architecture.channels[-1], architecture.head_width
        size = self.conditions.size
        for _ in architecture.stages:
            size = -(-size // 2)
        key = f"head {width} {channels}x{size}"
        if key not in self.entries:
            neck = Edge("1", channels, width).eval() if width else nn.Identity()
            fuse_edges(neck)
            head = Head(neck, nn.Linear(width or channels, self.conditions.num_classes))
            self.entries[key] = self._time({"head": head}, channels, size)["head"]
            self._save()
        return self.entries[key]

    def _time(self, modules: Mapping[str, nn.Module], channels: int, size: int) -> dict[str, float]:
        assert self.timer is not None
        batch = self.conditions.batch
        times = self.timer(modules, (batch, channels, size, size))
        return {name: seconds / batch for name, seconds in times.items()}

    def _save(self) -> None:
        if self.path:
            data = {
                "format": FORMAT,
                "conditions": vars(self.conditions),
                "factor": self.factor,
                "entries": self.entries,
            }
            write_text(self.path, json.dumps(data, indent=1, allow_nan=False) + "\n")

    def _load(self, path: Path) -> None:
        data: Any = read_json(path, max_bytes=MAX_BYTES)
        try:
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']} is not known here")
            found, factor = dict(data["conditions"]), data["factor"]
            self.factor = None if factor is None else _seconds(factor)
            self.entries = {key: _seconds(value) for key, value in data["entries"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path} is no table of latencies ({error}). Remove it to measure anew."
            ) from error
        if found != vars(self.conditions):
            changed = [k for k, v in vars(self.conditions).items() if found.get(k) != v]
            raise ValueError(
                f"{path} was measured with another {' and '.join(changed)}. Choose another folder."
            )


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise ValueError(f"a time must be a number from 0, got {value!r:.40}")
    return float(value)


def _key(stage: Stage) -> str:
    """What the time of a block depends on; the number of blocks is none of it."""
    return str(replace(stage, num_blocks=1))


def _fused_blocks(index: int, stage: Stage, inputs: int, num_blocks: int) -> nn.Sequential:
    blocks = make_stage(index, replace(stage, num_blocks=num_blocks), inputs).eval()
    fuse_edges(blocks)
    return blocks


def _entry_conv(channels: int) -> nn.Sequential:
    """What stands before a timed block, so that its input comes from an operator."""
    return nn.Sequential(nn.Conv2d(channels, channels, 1), nn.ReLU())
