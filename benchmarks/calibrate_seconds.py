"""One record of the seconds that `nabla calibrate` predicted and measured.

nabla calibrate --speed-up 1.3 --sparse-algo 'topk-*_tail-first' --sparse-algo 'topk-*' \\
    --json > printed.json
python -m benchmarks.calibrate_seconds printed.json 1.3
"""

from pathlib import Path

import torch
import typer

from nabla_attn.bench.suite import make_record
from nabla_attn.files import read_json

OUTPUT = Path("benchmarks/results/isynet/attention.json")


def main(printed: Path, speed_up: float, output: Path = OUTPUT) -> None:
    """Keep the seconds of what was printed.

    Args:
        printed: What `nabla calibrate --json` printed.
        speed_up: What was asked for.
        output: The record.
    """
    results = [{"name": name, **row} for name, row in read_json(printed)["seconds"].items()]
    config = {"model": "builtin", "frames": 61, "speed_up": speed_up, "threads": 1}
    make_record("calibrate-seconds", config, results, torch.device("cpu")).save(output)


if __name__ == "__main__":
    typer.run(main)
