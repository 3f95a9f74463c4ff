"""The benchmark where only Python and PyTorch are installed: `python -m nabla_attn.bench`."""

import argparse
import sys
from pathlib import Path

import torch

from nabla_attn.bench.suite import default_suite, run_suite
from nabla_attn.bench.tables import section
from nabla_attn.record import RunRecord


def main() -> None:
    """Measure, save the records and print their tables as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m nabla_attn.bench", description=__doc__)
    parser.add_argument("workloads", nargs="*", help="default: those of the device")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument(
        "--budget", type=float, help="seconds after which no new measurement starts"
    )
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is here. Use --device cpu.")
    names = tuple(options.workloads) or default_suite(device)
    try:
        paths = run_suite(
            names,
            device,
            options.output,
            rounds=options.rounds,
            on_job=_say,
            budget=options.budget,
        )
    except ValueError as error:
        parser.error(str(error))
    for path in paths:
        sys.stdout.write(section(RunRecord.load(path)) + "\n")


def _say(title: str) -> None:
    sys.stderr.write(f"measuring {title}\n")


if __name__ == "__main__":
    main()
