"""The same benchmark on another commit, in a throwaway worktree."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from nabla_attn.record import RunRecord


def measure_revision(revision: str, name: str, device: str, rounds: int) -> RunRecord:
    """Run `nabla bench` of one workload with the package as it was at `revision`.

    Args:
        revision: anything git can name.
        name: the workload.
        device: the device.
        rounds: timed rounds.

    Raises:
        ValueError: not in a git checkout, an unknown revision, or a run that failed there.
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
    """Share of ideal now over share of ideal then, for every contender that ran in both."""
    rows = []
    pairs = zip(ours.numbers["results"], base.numbers["results"], strict=False)
    for now, then in pairs:
        for name, result in now.get("contenders", {}).items():
            before = then.get("contenders", {}).get(name, {}).get("share_of_ideal")
            if before and "share_of_ideal" in result and not result["is_dense"]:
                row = {key: now[key] for key in ("workload", "dtype", "density", "direction")}
                rows.append(row | {"contender": name, "ratio": result["share_of_ideal"] / before})
    return rows
