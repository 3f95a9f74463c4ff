"""Search FlexAttention's options on this machine: `python -m nabla_attn.bench.tune`, torch only.

Writes the table that `backends.flex_options` reads before the package's own, and a record of
each workload.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nabla_attn import backends
from nabla_attn.attention import build_block_map
from nabla_attn.backends import flex
from nabla_attn.backends.flex_options import (
    FlexOptions,
    fits,
    flex_options,
    forget_tables,
    has_tma,
    key_of,
    table_rows,
    tuned_file,
    why_not_flash,
)
from nabla_attn.bench.measure import check_output, sample_rows, time_in_turn, token_rows
from nabla_attn.bench.suite import device_name, make_record
from nabla_attn.bench.workloads import Workload, make_inputs, workload
from nabla_attn.core.order import to_blocks, to_raster
from nabla_attn.files import write_text

# Head dims of 128 and 64.
WORKLOADS = ("wan14b-720p", "kandinsky5-10s")
DENSITY = 0.2
TILE_ROWS, WARPS, STAGES = (1, 2), (4, 8), (2, 3, 4)


def candidates(device: torch.device, block_tokens: int, head_dim: int) -> Iterator[FlexOptions]:
    """Yield the options worth trying, the default first; only GPUs have kernel options.

    Left out are kernels that would not keep their rows in registers, 128 rows of 128 dims in four
    warps, and those that do not fit in shared memory: torch would run them with other stages.
    """
    yield FlexOptions()
    yield FlexOptions(2)
    if device.type != "cuda":
        return
    if why_not_flash(device, block_tokens) is None:
        yield FlexOptions(1, {"BACKEND": "FLASH"})
    if has_tma(device):
        for rows in TILE_ROWS:
            yield FlexOptions(rows, {"fwd_USE_TMA": True})
    for rows, warps, stages in product(TILE_ROWS, WARPS, STAGES):
        height = rows * block_tokens
        has_registers = min(height, 128) * head_dim <= warps * 2048
        if has_registers and fits(device, height, block_tokens, stages, head_dim=head_dim):
            # These are for the forward; the backward has kernels of its own.
            yield FlexOptions(rows, {"fwd_num_warps": warps, "fwd_num_stages": stages})


def tune(
    work: Workload, device: torch.device, *, rounds: int = 5, deadline: float | None = None
) -> dict[str, Any]:
    """Check and time the candidates on one workload, forward.

    Args:
        work: The shape.
        device: The device to run on.
        rounds: Number of timed rounds.
        deadline: The value of `time.monotonic()` after which no candidate is compiled.

    Returns:
        The key that options are found by, every candidate's seconds or reason, and the best.

    Raises:
        ValueError: No candidate gave a right output.
    """
    inputs = make_inputs(work, DENSITY, device)
    block_map = build_block_map(inputs.q, inputs.k, work.grid, inputs.config)
    q, k, v = (to_blocks(x, work.grid) for x in (inputs.q, inputs.k, inputs.v))
    rows = sample_rows(work.grid.num_tokens)
    keep = token_rows(block_map, work.grid, rows)
    tried: list[dict[str, Any]] = []
    runs: dict[str, Any] = {}
    for index, options in enumerate(candidates(device, work.grid.block.tokens, work.dim)):
        tried.append({"tile_rows": options.tile_rows, "kernel_options": options.kernel})
        if deadline is not None and time.monotonic() > deadline:
            tried[-1]["why_not"] = "no time was left"
            continue

        def run(options: FlexOptions = options) -> Tensor:
            with torch.no_grad(), flex_options(options):
                return flex.attend(q, k, v, block_map)

        try:
            out = to_raster(run(), work.grid)
        except (RuntimeError, ValueError) as error:
            tried[-1]["why_not"] = str(error).strip().splitlines()[0]
            continue
        if check_output(out, inputs.q, inputs.k, inputs.v, rows, keep)["passed"]:
            runs[str(index)] = run
        else:
            tried[-1]["why_not"] = "its output is outside the error budget"
    if not runs:
        raise ValueError(f"{work.name}: no candidate ran, the first because {tried[0]['why_not']}.")
    for name, timing in time_in_turn(runs, device, rounds=rounds).items():
        tried[int(name)]["seconds"] = timing.to_dict()
    best = min((t for t in tried if "seconds" in t), key=lambda t: t["seconds"]["median"])
    key = key_of(inputs.q, work.grid.block.tokens, needs_backward=False)
    chosen = {name: best[name] for name in ("tile_rows", "kernel_options")}
    return {"workload": work.name, "key": key, "best": chosen, "tried": tried}


def save_table(results: list[dict[str, Any]], path: Path, records: list[Path]) -> None:
    """Write the best options of each workload where `choose_options` finds them.

    Rows of other workloads stay, after the new ones: of two that fit a call the newest counts.
    """
    forget_tables()
    rows = [
        {"workload": result["workload"]} | result["key"] | result["best"] | {"record": record.name}
        for result, record in zip(results, records, strict=True)
    ]
    tuned = {row["workload"] for row in rows}
    rows += [row for row in table_rows(path) if row.get("workload") not in tuned]
    write_text(path, json.dumps({"rows": rows}, indent=2) + "\n")
    forget_tables()


def main(arguments: list[str] | None = None) -> None:
    """Tune on every workload, save the table and the records, and print what was chosen."""
    parser = argparse.ArgumentParser(prog="python -m nabla_attn.bench.tune", description=__doc__)
    parser.add_argument("workloads", nargs="*", default=WORKLOADS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=400, help="seconds; then no new candidate")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--dry-run", action="store_true", help="list the candidates and end")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available() and not options.dry_run:
        parser.error("no CUDA device is here. --dry-run lists what would be tried.")
    try:
        works = [workload(name) for name in options.workloads]
        reason = backends.why_not("flex", device)
        if options.dry_run or reason is not None:
            for work in works:
                for candidate in candidates(device, work.grid.block.tokens, work.dim):
                    sys.stdout.write(f"{work.name}: {candidate}\n")
            sys.stdout.write(f"{reason or 'nothing was run'}\n")
            return
        table_rows(tuned_file(device))  # refuses an unreadable one before the search
        share = options.budget / len(works)
        results = [
            tune(work, device, rounds=options.rounds, deadline=time.monotonic() + share)
            for work in works
        ]
    except ValueError as error:
        parser.error(str(error))
    names = [f"tune_{work.name}_{device_name(device)}.json" for work in works]
    paths = [options.output / name for name in names]
    for result, path in zip(results, paths, strict=True):
        make_record("tune", {"density": DENSITY}, [result], device).save(path)
        sys.stdout.write(f"{result['key']}: {result['best']}\nrecord: {path}\n")
    save_table(results, tuned_file(device), paths)
    sys.stdout.write(f"table: {tuned_file(device)}\n")


if __name__ == "__main__":
    main()
