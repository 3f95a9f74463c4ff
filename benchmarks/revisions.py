"""Compare records of `nabla bench` with another commit, measured in a temporary worktree.

python -m benchmarks.revisions COMMIT benchmarks/results/bench_toy-cpu_cpu.json
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import typer

from nabla_attn.record import RunRecord

CASE = ("workload", "dtype", "density", "direction", "contender")
"""The keys by which two measurements are paired."""


def measure_revision(revision: str, name: str, device: str, rounds: int) -> RunRecord:
    """Run `nabla bench` of one workload with the package as it was at `revision`.

    Args:
        revision: The commit, by any name that git knows.
        name: Name of the workload.
        device: The device to run on.
        rounds: Number of timed rounds.

    Raises:
        ValueError: This is no git checkout, the commit is unknown, or the run failed there.
    """
    root = _git("rev-parse", "--show-toplevel")
    commit = _git("rev-parse", "--verify", f"{revision}^{{commit}}")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        _git("worktree", "add", "--detach", str(tree), commit)
        try:
            return _run_in(tree, name, device, rounds)
        finally:
            _git("-C", root, "worktree", "remove", "--force", str(tree))


def _run_in(tree: Path, name: str, device: str, rounds: int) -> RunRecord:
    options = ["--workload", name, "--device", device, "--rounds", str(rounds), "--output", "out"]
    process = subprocess.run(
        [sys.executable, "-m", "nabla_attn.cli", "bench", *options],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree / "src")},
        capture_output=True,
        text=True,
    )
    records = sorted((tree / "out").glob("bench_*.json"))
    if process.returncode or not records:
        reason = process.stderr.strip().splitlines()[-1:] or ["no record was written"]
        raise ValueError(f"the benchmark failed at that revision: {reason[0]}")
    return RunRecord.load(records[0])


def _git(*arguments: str) -> str:
    process = subprocess.run(["git", *arguments], capture_output=True, text=True)
    if process.returncode:
        reason = process.stderr.strip().splitlines()[-1:] or ["unknown error"]
        raise ValueError(f"git {arguments[0]} failed: {reason[0]}. Run inside the checkout.")
    return process.stdout.strip()


def ratios(ours: RunRecord, base: RunRecord) -> list[dict[str, Any]]:
    """Divide the share of ideal by that of the base, for every case that ran in both."""
    then = _shares(base)
    return [
        dict(zip(CASE, case, strict=True)) | {"ratio": share / then[case]}
        for case, share in _shares(ours).items()
        if case in then
    ]


def only_in(record: RunRecord, other: RunRecord) -> list[str]:
    """List the cases that ran in one record and not in the other, as lines of text."""
    return [" ".join(map(str, case)) for case in _shares(record) if case not in _shares(other)]


def _shares(record: RunRecord) -> dict[tuple[Any, ...], float]:
    """Return the share of ideal of each case in which a sparse contender ran."""
    shares = {}
    for result in record.numbers["results"]:
        for name, numbers in result.get("contenders", {}).items():
            if numbers.get("share_of_ideal") and not numbers["is_dense"]:
                # Densities are what a search for a round one reached.
                case = result | {"contender": name, "density": round(result["density"], 2)}
                shares[tuple(case[key] for key in CASE)] = numbers["share_of_ideal"]
    return shares


def main(base: str, records: list[Path], device: str = "cpu") -> None:
    """Measure what records of `nabla bench` measured at another commit, and compare.

    Args:
        base: The commit, by any name that git knows.
        records: Records of this tree.
        device: The device they were measured on.
    """
    for path in records:
        ours = RunRecord.load(path)
        name, rounds = ours.config["workload"], ours.config["rounds"]
        compare(base, ours, measure_revision(base, name, device, rounds))


def compare(base: str, ours: RunRecord, theirs: RunRecord) -> None:
    """Print the ratio of every case that ran in both, and the cases that one of them lacks."""
    for row in ratios(ours, theirs):
        *case, ratio = row.values()
        typer.echo(f"{' '.join(map(str, case))}: {ratio:.2f}x the share of ideal at {base}")
    for line in only_in(ours, theirs):
        typer.echo(f"{line}: not measured at {base}")
    for line in only_in(theirs, ours):
        typer.echo(f"{line}: measured at {base} alone")


if __name__ == "__main__":
    typer.run(main)
