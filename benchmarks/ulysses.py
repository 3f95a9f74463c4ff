"""Measure what sharing a video over processes changes in outputs and gradients of every model.

python -m benchmarks.ulysses; then `python -m benchmarks.pages` makes the table.
"""

import tempfile
from pathlib import Path

import torch
import torch.multiprocessing as mp
import typer
from tests.models import ulysses_worker
from tests.models.tiny_models import TINY

from nabla_attn.record import RunRecord, collect_versions, describe_device


def main(processes: int = 4, output: Path = Path("benchmarks/results/ulysses.json")) -> None:
    """Run the workers of tests/models on CPU processes and write the record."""
    names = tuple(ulysses_worker.CHANGES)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(ulysses_worker.main, args=(folder, processes, names), nprocs=processes)
        results = torch.load(Path(folder) / "results.pt")
    rows = [
        {
            "model": TINY[name].name,
            "processes": degree,
            "algorithm": algorithm,
            "largest_relative_difference": error,
        }
        for (name, degree, algorithm), (error, _) in results["cases"].items()
    ]
    balance = [
        {"processes": degree, "before": before, "after": after}
        for degree, (before, after, _) in results["balance"].items()
    ]
    RunRecord(
        kind="ulysses",
        config={"processes": processes, "backend": "gloo"},
        seed=0,
        versions=collect_versions(),
        device=describe_device(),
        numbers={"results": rows, "head_balance": balance},
    ).save(output)


if __name__ == "__main__":
    typer.run(main)
