"""One record of what ISyNet's commands measured on a machine: `python -m benchmarks.isynet_timed`.

isynet measure --json > measure.json
isynet bench space --machine here --json > spaces.json
isynet measure --runtime torch --output out/measure-torch --json > torch.json
isynet bench space --machine here --json > torch-spaces.json
isynet bench latency --json > latency.json
python -m benchmarks.isynet_timed measure.json spaces.json torch.json torch-spaces.json \\
    latency.json benchmarks/results/isynet_timed_MACHINE.json

Each `bench space` takes the rates that the `measure` before it left.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from nabla_attn.bench.suite import make_record
from nabla_attn.files import read_json


def main(
    measure: Path,
    spaces: Path,
    with_torch: Annotated[Path, typer.Argument(metavar="TORCH")],
    torch_spaces: Path,
    latency: Path,
    output: Path,
) -> None:
    """Gather what the commands printed.

    Args:
        measure: What `isynet measure` printed, with onnxruntime.
        spaces: What `isynet bench space` printed after it.
        with_torch: What `isynet measure` printed, with torch.
        torch_spaces: What `isynet bench space` printed after it.
        latency: What `isynet bench latency` printed.
        output: The record.
    """
    results = [
        {
            "onnxruntime": _networks(read_json(measure), read_json(spaces)),
            "torch": _networks(read_json(with_torch), read_json(torch_spaces)),
            "latency": read_json(latency),
        }
    ]
    config = {"size": 224, "batch": 16, "threads": 1, "latency_size": 32, "shared": True}
    make_record("isynet-timed", config, results, torch.device("cpu")).save(output)


def _networks(printed: dict[str, Any], spaces: dict[str, Any]) -> dict[str, Any]:
    """Return rates and networks without the place of the file on this machine."""
    return {
        "rates": printed["rates"],
        "plain_spearman": printed["plain MEM, rank correlation with the achieved rate"],
        "timed_spearman": printed["timed MEM, the same"],
        "networks": printed["networks"],
        "spaces": spaces["rows"],
    }


if __name__ == "__main__":
    typer.run(main)
