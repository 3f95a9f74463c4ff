"""Dense and sparse videos of one seed: what each cost and how close it came."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nabla_attn.config import parse
from nabla_attn.evaluation.metrics import measure_fidelity
from nabla_attn.generation.clock import Progress
from nabla_attn.generation.generate import generate, warm_up
from nabla_attn.generation.request import GenerationRequest, check_request
from nabla_attn.record import RunRecord


@dataclass(frozen=True)
class Run:
    """One algorithm's video and record; the record's ``numbers["to_dense"]`` compares it.

    Attributes:
        frames: uint8 [frames, height, width, 3].
        record: of the generation, with speed-up, PSNR and SSIM to dense added.
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
    progress: Callable[[str], Progress] | None = None,
) -> list[Run]:
    """Generate with dense attention and with each algorithm, from the same noise.

    Every algorithm first runs one untimed step, so that compiling and cold caches count nowhere.

    Args:
        pipeline: a text-to-video pipeline.
        request: what to make; its own algorithm is not used.
        algos: algorithms to compare with dense.
        progress: gives the progress callback of an algorithm's run.

    Returns:
        One run per algorithm, dense first.

    Raises:
        ValueError: no algorithm besides dense, an unknown one, or one the model cannot take.
    """
    names = [name for name in dict.fromkeys(str(parse(algo)) for algo in algos) if name != "dense"]
    if not names:
        raise ValueError("nothing to compare with dense. Pass --sparse-algo nabla-0.7 or another.")
    check_request(pipeline, request)
    runs: list[Run] = []
    for name in ("dense", *names):
        watch = progress(name) if progress else None
        if watch:
            watch("warm-up", 0, 1)
        asked = request.with_algo(name)
        warm_up(pipeline, asked)
        frames, record = generate(pipeline, asked, progress=watch)
        dense = runs[0] if runs else Run(frames, record)
        runs.append(Run(frames, _with_comparison(frames, record, dense)))
    return runs


def _with_comparison(frames: np.ndarray, record: RunRecord, dense: Run) -> RunRecord:
    ours, theirs = (r.numbers["seconds"]["transformer"] for r in (record, dense.record))
    to_dense = {"speed_up": round(theirs / ours, 4) if ours else None}
    to_dense |= measure_fidelity(frames, dense.frames).to_dict()
    return replace(record, numbers=record.numbers | {"to_dense": to_dense})
