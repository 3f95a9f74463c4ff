"""Dense and sparse videos of one seed: what each cost and how close it came."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from nabla_attn.config import parse
from nabla_attn.evaluation.metrics import measure_fidelity
from nabla_attn.generation.generate import generate, warm_up
from nabla_attn.generation.request import GenerationRequest, check_request
from nabla_attn.progress import ProgressCallback, ignore_progress
from nabla_attn.record import RunRecord


@dataclass(frozen=True)
class Compared:
    """One algorithm's video and record; the record's `numbers["to_dense"]` compares it.

    Attributes:
        frames: uint8 [frames, height, width, 3].
        record: Of the generation, with speed-up, PSNR and SSIM to dense added.
    """

    frames: np.ndarray
    record: RunRecord

    @property
    def algo(self) -> str:
        """The algorithm string."""
        return str(self.record.config["sparse_algo"])


def compare(
    pipeline: Any,
    request: GenerationRequest,
    algos: Sequence[str],
    *,
    rounds: int = 1,
    on_progress: Callable[[str], ProgressCallback] = lambda algo: ignore_progress,
) -> list[Compared]:
    """Generate with dense attention and with each algorithm, from the same noise.

    Every algorithm first runs one untimed step, so that compiling and cold caches count nowhere.
    Several rounds run in turn; the transformer's seconds are then medians, and the record holds
    all of them.

    Args:
        pipeline: A text-to-video pipeline.
        request: What to make; its own algorithm is not used.
        algos: Algorithms to compare with dense.
        rounds: How often every algorithm runs.
        on_progress: Called with an algorithm, gives the progress callback of its run.

    Returns:
        One run per algorithm, dense first.

    Raises:
        ValueError: No algorithm besides dense, an unknown one, one the model cannot take, or no
            round.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}.")
    names = sparse_names(algos)
    check_request(pipeline, request)
    made: dict[str, tuple[np.ndarray, RunRecord]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in ("dense", *names)}
    for _ in range(rounds):
        for name in seconds:
            watch = on_progress(name)
            asked = request.with_algo(name)
            if name not in made:
                watch("warm-up", 0, 1)
                warm_up(pipeline, asked)
            frames, record = generate(pipeline, asked, on_progress=watch)
            seconds[name].append(record.numbers["seconds"]["transformer"])
            made.setdefault(name, (frames, record))
    runs = [Compared(made[name][0], _with_rounds(made[name][1], seconds[name])) for name in made]
    return [Compared(run.frames, _with_comparison(run.frames, run.record, runs[0])) for run in runs]


def _with_rounds(record: RunRecord, seconds: list[float]) -> RunRecord:
    stages = record.numbers["seconds"] | {"transformer": median(seconds)}
    return replace(record, numbers=record.numbers | {"seconds": stages, "rounds": seconds})


def _with_comparison(frames: np.ndarray, record: RunRecord, dense: Compared) -> RunRecord:
    ours, theirs = (r.numbers["seconds"]["transformer"] for r in (record, dense.record))
    to_dense = {"speed_up": round(theirs / ours, 4) if ours else None}
    to_dense |= measure_fidelity(frames, dense.frames).to_dict()
    return replace(record, numbers=record.numbers | {"to_dense": to_dense})


def sparse_names(algos: Iterable[str]) -> list[str]:
    """The algorithms that are compared with dense, each once.

    Raises:
        ValueError: There is none, or one does not parse.
    """
    names = [name for name in dict.fromkeys(str(parse(algo)) for algo in algos) if name != "dense"]
    if not names:
        raise ValueError("nothing to compare with dense. Pass --sparse-algo nabla-0.7 or another.")
    return names
