"""Time the first answer of `nabla generate` on fresh caches against the second one.

python -m benchmarks.cold_start

Every run is a process of its own. Files of the libraries are read once before anything is timed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from nabla_attn.bench.suite import make_record
from nabla_attn.record import RunRecord

PROMPT = "a small yellow square moving left on a black background"
# Frames and pixels of a side: 4,096 and 16,384 tokens.
SIZES = ((61, 128), (61, 256))
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "NABLA_ATTN_CACHE", "TRITON_CACHE_DIR")


def measure(frames: int, side: int, *, steps: int | None, rounds: int) -> dict[str, Any]:
    """Seconds of the first and of the second run, each a median over rounds of fresh caches.

    Args:
        frames: Frames of the video.
        side: Pixels of its sides.
        steps: Number of denoising steps; None takes those of the model.
        rounds: Number of pairs of runs.
    """
    size = ["--frames", str(frames), "--height", str(side), "--width", str(side)]
    arguments = [*size, *(["--steps", str(steps)] if steps else [])]
    pairs, tokens = [], {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            fresh = {name: str(Path(folder) / name.lower()) for name in CACHES}
            output = Path(folder) / "video.mp4"
            pairs.append([_seconds(arguments, output, fresh) for _ in range(2)])
            tokens = RunRecord.load(output.with_suffix(".json")).numbers["tokens"]
    first, second = map(median, zip(*pairs, strict=True))
    return {
        "frames": frames,
        "side": side,
        "steps": steps,
        "tokens": tokens,
        "first_seconds": first,
        "second_seconds": second,
        "ratio": first / second,
        "rounds": pairs,
    }


def _seconds(arguments: list[str], output: Path, fresh: dict[str, str]) -> float:
    command = [sys.executable, "-m", "nabla_attn.cli", "generate", "--prompt", PROMPT]
    command += ["--device", "cpu", "--overwrite", "--quiet", "--output", str(output)]
    began = time.perf_counter()
    subprocess.run([*command, *arguments], env=os.environ | fresh, check=True)
    return time.perf_counter() - began


def main(arguments: list[str] | None = None) -> None:
    """Measure every size and save the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs for each size")
    parser.add_argument("--steps", type=int, help="default: the model's")
    parser.add_argument("--sizes", type=int, nargs=2, action="append", metavar=("FRAMES", "SIDE"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cold_start.json"))
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        _seconds(["--frames", "5", "--steps", "1"], Path(folder) / "video.mp4", {})
    results = []
    for frames, side in options.sizes or SIZES:
        results.append(measure(frames, side, steps=options.steps, rounds=options.rounds))
        sys.stderr.write("{frames} frames of {side}: {ratio:.2f}\n".format(**results[-1]))
    config = {"workload": "first answer", "prompt": PROMPT, "threads": torch.get_num_threads()}
    make_record("cold_start", config, results, torch.device("cpu")).save(options.output)


if __name__ == "__main__":
    main()
