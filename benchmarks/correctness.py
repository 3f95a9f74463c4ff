"""Measure golden parity and the errors of backends: the figures behind docs/correctness.md.

python -m benchmarks.correctness tests/golden benchmarks/results/correctness.json
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nabla_attn import backends
from nabla_attn.attention import build_block_map, nabla_attention
from nabla_attn.bench.measure import check_output, token_rows
from nabla_attn.bench.suite import make_record
from nabla_attn.bench.workloads import Workload, make_inputs
from nabla_attn.config import SparseConfig
from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.order import to_blocks, to_raster

CPU = torch.device("cpu")
GRIDS = {
    "exact 4x16x24": TokenGrid(4, 16, 24),
    "ragged 3x11x13": TokenGrid(3, 11, 13),
    "one frame 1x45x80": TokenGrid(1, 45, 80),
}


def measure_parity(golden: Path) -> list[dict[str, Any]]:
    """Compare every recorded map and output of the reference with ours.

    Args:
        golden: The folder of the recorded `mask_t*.npz` files.

    Raises:
        ValueError: The folder holds none.
    """
    files = sorted(golden.glob("mask_t*.npz"))
    if not files:
        raise ValueError(f"no recorded maps in {golden}. Pass the folder tests/golden.")
    return [_parity_of(path) for path in files]


def _parity_of(path: Path) -> dict[str, Any]:
    with np.load(path) as z:
        data = {name: z[name] for name in z.files}
    frames, rows, columns = (int(count) for count in data["grid"])
    grid = TokenGrid(frames, 8 * rows, 8 * columns)
    q, k, v = (
        to_raster(torch.from_numpy(data[f"{name}_int8"]).float() * float(data["scale"]), grid)
        for name in "qkv"
    )
    seen = torch.from_numpy(data["rows"]).long()
    differing, error = 0, 0.0
    for threshold, sides, mask, out in zip(
        data["thr"], data["sta"], data["mask"], data["out_rows"], strict=True
    ):
        window = (int(sides[0]), int(sides[1]), int(sides[2])) if sides.any() else None
        config = SparseConfig(threshold=float(threshold), window=window)
        differing += int((build_block_map(q, k, grid, config).mask.numpy() != mask).sum())
        ours = to_blocks(nabla_attention(q, k, v, grid, config), grid)[:, :, seen]
        error = max(error, float((ours - torch.from_numpy(out)).abs().max()))
    return {
        "file": path.stem,
        "maps": len(data["thr"]) * q.shape[1],
        "entries": int(data["mask"].size),
        "differing_entries": differing,
        "largest_output_difference": error,
    }


def measure_backends() -> list[dict[str, Any]]:
    """Measure the error of every backend against float64, by data type and grid."""
    results = []
    for name, grid in GRIDS.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            work = Workload(name, grid, 2, 64, "", dtype)
            inputs = make_inputs(work, 0.3, CPU)
            q, k, v = inputs.q, inputs.k, inputs.v
            rows = torch.arange(grid.num_tokens)
            keep = token_rows(build_block_map(q, k, grid, inputs.config), grid, rows)
            for backend in backends.NAMES:
                if backends.why_not(backend, CPU) is not None:
                    continue
                with torch.no_grad():
                    out = nabla_attention(q, k, v, grid, inputs.config, backend=backend)
                result = check_output(out, q, k, v, rows, keep)
                kind = str(dtype).removeprefix("torch.")
                results.append({"grid": name, "dtype": kind, "backend": backend} | result)
    return results


def main(golden: str, output: str) -> None:
    """Measure and save the record."""
    results = [{"parity": measure_parity(Path(golden)), "backends": measure_backends()}]
    make_record("correctness", {}, results, CPU).save(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
