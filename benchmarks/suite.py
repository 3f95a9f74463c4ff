"""The benchmark with its baselines; it needs only Python and PyTorch.

PYTHONPATH=src python -m benchmarks.suite
"""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.baselines import Baselines
from nabla_attn.bench.report import contender_table, section
from nabla_attn.bench.suite import default_suite, run_suite
from nabla_attn.record import RunRecord


def main() -> None:
    """Measure, save the records and print their tables as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite", description=__doc__)
    parser.add_argument("workloads", nargs="*", help="default: those of the device")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument(
        "--budget", type=float, help="seconds after which no new measurement starts"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the contenders and end")
    options = parser.parse_args()
    device = torch.device(options.device)
    names = tuple(options.workloads) or default_suite(device)
    try:
        if options.dry_run:
            baselines = Baselines(has_variants=True)
            sys.stdout.write(contender_table(names, device, baselines=baselines))
            return
        if device.type == "cuda" and not torch.cuda.is_available():
            parser.error("no CUDA device is here. Use --device cpu.")
        paths = run_suite(
            names,
            device,
            options.output,
            rounds=options.rounds,
            on_progress=_say,
            budget=options.budget,
            baselines=Baselines(),
        )
    except ValueError as error:
        parser.error(str(error))
    for path in paths:
        sys.stdout.write(section(RunRecord.load(path)) + "\n")


def _say(stage: str, done: int, total: int) -> None:
    sys.stderr.write(f"measuring {stage} ({done + 1} of {total})\n")


if __name__ == "__main__":
    main()
