"""Measure what tails of dropped blocks gain on the built-in model, and what they cost.

python -m benchmarks.tails error; python -m benchmarks.tails cost; then `python -m benchmarks.pages`
makes the tables. `error` continues with the prompts that its record does not have yet.
"""

import hashlib
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer

import nabla_attn as na
from nabla_attn.bench.measure import peak_bytes, time_in_turn
from nabla_attn.bench.workloads import make_inputs, workload
from nabla_attn.calibrate.candidates import CandidateProbe
from nabla_attn.config import TAILS
from nabla_attn.generation.call import sample
from nabla_attn.generation.pipeline import BUILTIN_DIRECTORY, load_pipeline
from nabla_attn.generation.request import GenerationRequest, ModelDefaults, video_tokens
from nabla_attn.record import RunRecord, collect_versions, describe_device

PROMPTS = (
    "a large red circle moving right",
    "a small blue square moving up",
    "a large purple triangle moving down",
    "a small green circle moving left",
)
RULES = (
    *("topk-0.05", "topk-0.1", "topk-0.2", "nabla-0.3", "nabla-0.5", "nabla-0.7"),
    *("nabla-0.2_sta-3-3-3", "sta-3-3-3"),
)
KINDS: tuple[str | None, ...] = (None, *TAILS)
app = typer.Typer(add_completion=False)


@app.command()
def error(
    frames: int = 33,
    steps: int = 6,
    guidance: float = 3.0,
    num_rows: int = 16,
    output: Path = Path("benchmarks/results/tail_error.json"),
) -> None:
    """Measure the error of attention's output for every rule and tail, prompt by prompt."""
    pipeline = load_pipeline("builtin")
    request, settings = recorded_settings(pipeline, frames, steps, guidance)
    config = settings | {"workload": "tails", "num_rows": num_rows, "rules": list(RULES)}
    results = earlier(output, config)
    for prompt in PROMPTS:
        if any(result["prompt"] == prompt for result in results):
            continue
        rows = measure(pipeline, replace(request, prompt=prompt), num_rows)
        results.append({"prompt": prompt, "rows": rows})
        device = describe_device(pipeline.device)
        numbers = {"results": results}
        RunRecord("tail_error", config, 0, collect_versions(), device, numbers).save(output)
        sys.stderr.write(f"{prompt}\n")


def recorded_settings(
    pipeline: Any, frames: int, steps: int, guidance: float
) -> tuple[GenerationRequest, dict[str, Any]]:
    """Return the request of a run whose attention is measured, and what its record says of it."""
    defaults = ModelDefaults.load(BUILTIN_DIRECTORY)
    size: dict[str, Any] = {"height": defaults.height, "width": defaults.width, "frames": frames}
    request = GenerationRequest(prompt=PROMPTS[0], steps=steps, guidance=guidance, **size)
    weights = BUILTIN_DIRECTORY / "transformer" / "diffusion_pytorch_model.safetensors"
    return request, {
        "steps": steps,
        "guidance": guidance,
        "tokens": list(video_tokens(pipeline, request)),
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }


def measure(pipeline: Any, request: GenerationRequest, num_rows: int) -> list[dict[str, Any]]:
    """Return density and error of every rule and tail, means over the calls of a dense run."""
    cases = [(rule, kind) for rule in RULES for kind in KINDS]
    candidates = [replace(na.parse(rule), tail=kind) for rule, kind in cases]
    probe = CandidateProbe(candidates, request.steps, num_rows=num_rows)
    with na.apply(pipeline, "nabla-1") as handle:
        probe.attach(handle)
        sample(pipeline, request, output_type="latent")
    losses = probe.losses()
    found = (numbers.mean(axis=(0, 1, 2)).tolist() for numbers in (losses.density, losses.error))
    means = zip(cases, *found, strict=True)
    return [
        {"rule": rule, "tail": kind, "density": round(density, 6), "error": round(error, 6)}
        for (rule, kind), density, error in means
    ]


def earlier(output: Path, config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the results of the record that an earlier run left; none where settings differ."""
    if not output.exists():
        return []
    record = RunRecord.load(output)
    return record.numbers["results"] if record.config == config else []


@app.command()
def cost(
    name: str = "toy-16k",
    density: float = 0.1,
    rounds: int = 5,
    device: str = "cpu",
    output: Path = Path("benchmarks/results/tail_cost.json"),
) -> None:
    """Time attention of one workload with and without tails, in turn."""
    work, where = workload(name), torch.device(device)
    inputs = make_inputs(work, density, where)
    runs = {
        str(kind or "dropped"): partial(
            na.nabla_attention,
            inputs.q,
            inputs.k,
            inputs.v,
            work.grid,
            replace(inputs.config, tail=kind),
        )
        for kind in KINDS
    }
    timings = time_in_turn(runs, where, rounds=rounds)
    results = [
        {
            "tail": kind,
            "seconds": timing.to_dict(),
            "over_dropped": round(timing.median / timings["dropped"].median, 4),
            "peak_bytes": peak_bytes(runs[kind], where),
        }
        for kind, timing in timings.items()
    ]
    kept = na.build_block_map(inputs.q, inputs.k, work.grid, inputs.config).density
    config = {
        "workload": "cost of tails",
        "shape": name,
        "algorithm": str(inputs.config),
        "density": kept,
        "tokens": [work.grid.frames, work.grid.height, work.grid.width],
        "dtype": str(work.dtype).removeprefix("torch."),
    }
    versions, machine = collect_versions(), describe_device(where)
    RunRecord("tail_cost", config, 0, versions, machine, {"results": results}).save(output)


if __name__ == "__main__":
    app()
