"""What only a GPU can show: right outputs and gradients, a layer of Wan 14B, the built-in model.

PYTHONPATH=src python -m benchmarks.gpu correctness | layer | model

`correctness` needs only Python and PyTorch, `layer` diffusers too, `model` the whole package. Each
starts nothing new once its budget of seconds is spent, and saves records.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nabla_attn import backends
from nabla_attn.attention import build_block_map, nabla_attention
from nabla_attn.bench.measure import attend_rows, token_rows
from nabla_attn.bench.suite import MODEL_DENSITIES, device_name, make_record
from nabla_attn.bench.workloads import Workload, make_inputs
from nabla_attn.core.grid import TokenGrid
from nabla_attn.record import RunRecord

# Exact and ragged, one frame, and blocks of 128 tokens.
GRIDS = (TokenGrid(5, 24, 40), TokenGrid(3, 20, 27), TokenGrid(1, 45, 80))
DTYPES, DIMS = (torch.bfloat16, torch.float16, torch.float32), (64, 128)
TINY_GRIDS = (TokenGrid(1, 9, 12),)
PROMPT = "a small yellow square moving left on a black background"
ALGORITHMS = ("nabla-0.3_sta-3-3-3", "nabla-0.5")


@dataclass(frozen=True)
class Settings:
    """What a command was asked for.

    Attributes:
        device: The device to run on.
        output: The folder of the records.
        end: The value of `time.monotonic()` after which nothing new starts.
        is_tiny: Whether the smallest sizes that go all the way are enough, on a CPU.
    """

    device: torch.device
    output: Path
    end: float
    is_tiny: bool

    @property
    def has_time(self) -> bool:
        """Whether something new may start."""
        return time.monotonic() < self.end


def check_correctness(settings: Settings) -> list[Path]:
    """Hold outputs and gradients of every backend against float64; one record."""
    results, left_out = [], []
    for name, case in _cases(settings):
        if settings.has_time:
            results.append({"case": name} | _check(*case, settings.device))
        else:
            left_out.append(name)
    record = make_record("correctness-gpu", {"left_out": left_out}, results, settings.device)
    path = settings.output / f"correctness_{device_name(settings.device)}.json"
    record.save(path)
    wrong = [row["case"] for row in results if row["passed"] is False]
    checked = sum(row["passed"] is not None for row in results)
    sys.stdout.write(f"{checked} cases run, {len(wrong)} outside the error budget: {wrong}\n")
    return [path]


def _cases(settings: Settings) -> Iterator[tuple[str, tuple[str, Workload, bool]]]:
    grids = TINY_GRIDS if settings.is_tiny else GRIDS
    dims = DIMS[:1] if settings.is_tiny else DIMS
    names = [name for name in backends.NAMES if name != "reference"]
    for grid, dim, dtype, name, needs_grad in product(grids, dims, DTYPES, names, (False, True)):
        kind = str(dtype).removeprefix("torch.")
        direction = "forward+backward" if needs_grad else "forward"
        work = Workload(str(grid), grid, 2, dim, "", dtype)
        yield f"{name} {grid} {dim} {kind} {direction}", (name, work, needs_grad)


def _check(name: str, work: Workload, needs_grad: bool, device: torch.device) -> dict[str, Any]:
    """The largest errors of one case and their budgets, or the reason why it cannot run."""
    reason = backends.why_not(
        name,
        device,
        needs_grad=needs_grad,
        dtype=work.dtype,
        head_dim=work.dim,
        block_tokens=work.grid.block.tokens,
    )
    if reason is not None:
        return {"passed": None, "why_not": reason}
    inputs = make_inputs(work, 0.3, device)
    leaves = [x.detach().requires_grad_(needs_grad) for x in (inputs.q, inputs.k, inputs.v)]
    block_map = build_block_map(inputs.q, inputs.k, work.grid, inputs.config)
    keep = token_rows(block_map, work.grid, torch.arange(work.grid.num_tokens))

    def results_of(attend: Any, tensors: list[Tensor]) -> list[Tensor]:
        out = attend(*tensors)
        if not needs_grad:
            return [out]
        grad = torch.ones_like(out) * torch.linspace(-1, 1, out.shape[-1], device=device)
        return [out, *torch.autograd.grad(out, tensors, grad.to(out.dtype))]

    def plainly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_rows(q, k, v, keep)

    def sparsely(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nabla_attention(q, k, v, work.grid, inputs.config, backend=name)

    ours = results_of(sparsely, leaves)
    wide = [x.detach().double().requires_grad_(needs_grad) for x in leaves]
    exact, plain = results_of(plainly, wide), results_of(plainly, leaves)
    found: dict[str, Any] = {"passed": True}
    for label, got, truth, low in zip(("out", "dq", "dk", "dv"), ours, exact, plain, strict=False):
        error = (got.double() - truth).abs().max().item()
        rounding = torch.finfo(work.dtype).eps * truth.abs().max().item()
        budget = 2 * (low.double() - truth).abs().max().item() + rounding
        found[label] = {"error": error, "budget": budget}
        found["passed"] = found["passed"] and error <= budget
    return found


def time_layer(settings: Settings) -> list[Path]:
    """Time one layer with the shape of Wan2.1 14B at 1280x720, dense and sparse; one record."""
    from nabla_attn.bench import scaling

    results = []
    for density in MODEL_DENSITIES:
        if settings.has_time:
            results.append(scaling.measure_model(settings.device, density, num_layers=1, rounds=3))
    config = {"rounds": 3, "layers": 1}
    path = settings.output / f"bench_model_{device_name(settings.device)}.json"
    make_record("bench-model", config, results, settings.device).save(path)
    for row in results:
        sys.stdout.write(f"density {row['density']}: {row['speed_up']:.2f} times as fast\n")
    return [path]


def compare_model(settings: Settings) -> list[Path]:
    """Make a video with the built-in model, dense and sparse in turn; a record each."""
    from nabla_attn.evaluation.compare import compare
    from nabla_attn.generation.pipeline import load_pipeline
    from nabla_attn.generation.request import GenerationRequest

    frames, side, steps = (5, 64, 1) if settings.is_tiny else (225, 256, 6)
    sizes: dict[str, Any] = {"frames": frames, "height": side, "width": side, "steps": steps}
    pipeline = load_pipeline("builtin", device=str(settings.device))
    request = GenerationRequest(prompt=PROMPT, guidance=3.0, seed=0, **sizes)
    made = compare(pipeline, request, ALGORITHMS, rounds=1 if settings.is_tiny else 3)
    paths = []
    for each in made:
        name = f"builtin_{device_name(settings.device)}_{each.algo}.json"
        paths.append(settings.output / name)
        each.record.save(paths[-1])
        seconds = each.record.numbers["seconds"]["transformer"]
        sys.stdout.write(f"{each.algo}: {seconds:.2f} s in the transformer\n")
    return paths


COMMANDS = {"correctness": check_correctness, "layer": time_layer, "model": compare_model}


def main(arguments: list[str] | None = None) -> None:
    """Run one command and name its records."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--budget", type=float, default=400, help="seconds; then nothing new")
    parser.add_argument("--dry-run", action="store_true", help="the smallest sizes, on a CPU")
    options = parser.parse_args(arguments)
    device = torch.device("cpu" if options.dry_run else options.device)
    if device.type != "cpu" and not torch.cuda.is_available():
        parser.error("no CUDA device is here. --dry-run goes all the way on a CPU, at tiny size.")
    if device.type == "cpu" and not options.dry_run:
        parser.error("these sizes are for a GPU. Pass --dry-run for tiny ones on a CPU.")
    end = time.monotonic() + options.budget
    settings = Settings(device, options.output, end, is_tiny=options.dry_run)
    try:
        paths = COMMANDS[options.command](settings)
    except ValueError as error:
        parser.error(str(error))
    for path in paths:
        RunRecord.load(path)
        sys.stdout.write(f"record: {path}\n")


if __name__ == "__main__":
    main()
