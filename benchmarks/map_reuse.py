"""Measure what reusing maps costs on the built-in model, beside fresh maps.

python -m benchmarks.map_reuse; then `python -m benchmarks.pages` makes the table.
"""

import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
import typer

import nabla_attn as na
from nabla_attn.backends.gather import attend
from nabla_attn.block_selection import select_blocks
from nabla_attn.core.losses import BlockCall, measure_losses
from nabla_attn.generation.call import sample
from nabla_attn.generation.pipeline import BUILTIN_DIRECTORY, load_pipeline
from nabla_attn.generation.request import GenerationRequest, ModelDefaults, video_tokens
from nabla_attn.record import RunRecord, collect_versions, describe_device

PROMPTS = ("a large red circle moving right", "a small blue square moving up")
RULES: tuple[dict[str, Any], ...] = (
    {},
    {"reuse_guidance": True},
    {"reuse_steps": 2},
    {"reuse_steps": 3},
    {"reuse_steps": 2, "reuse_guidance": True},
)
MEASURES = ("density", "recall", "layer_error", "true_mass", "error_to_dense")


def main(
    algorithm: str = "nabla-0.5",
    frames: int = 33,
    steps: int = 6,
    guidance: float = 3.0,
    output: Path = Path("benchmarks/results/map_reuse.json"),
) -> None:
    """Measure every rule on every prompt and write the record."""
    pipeline = load_pipeline("builtin")
    defaults = ModelDefaults.load(BUILTIN_DIRECTORY)
    size: dict[str, Any] = {"height": defaults.height, "width": defaults.width, "frames": frames}
    rows = [{"rule": str(schedule(algorithm, rules)), **rules} for rules in RULES]
    sums = torch.zeros(len(RULES), len(MEASURES) + 2, dtype=torch.float64)
    for prompt in PROMPTS:
        request = GenerationRequest(
            prompt=prompt, steps=steps, guidance=guidance, sparse_algo=algorithm, **size
        )
        dense = sample(pipeline, request.with_algo("dense"), output_type="latent")
        fresh = None
        for index, rules in enumerate(RULES):
            latents, means = measure(pipeline, request, schedule(algorithm, rules))
            fresh = latents if fresh is None else fresh
            finals = torch.tensor([distance(latents, fresh), distance(latents, dense)])
            sums[index] += torch.cat([means, finals])
            sys.stderr.write(f"{prompt}: {rows[index]['rule']}\n")
    names = (*MEASURES, "latents_to_fresh", "latents_to_dense")
    for row, values in zip(rows, (sums / len(PROMPTS)).tolist(), strict=True):
        row |= {name: round(value, 6) for name, value in zip(names, values, strict=True)}
    weights = BUILTIN_DIRECTORY / "transformer" / "diffusion_pytorch_model.safetensors"
    config = {
        "workload": "map reuse",
        "algorithm": algorithm,
        "steps": steps,
        "guidance": guidance,
        "prompts": list(PROMPTS),
        "tokens": list(video_tokens(pipeline, request)),
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    device = describe_device(pipeline.device)
    RunRecord("map_reuse", config, 0, collect_versions(), device, {"results": rows}).save(output)


def schedule(algorithm: str, rules: dict[str, Any]) -> na.Schedule:
    """Return the schedule of an algorithm under rules of reuse."""
    return na.Schedule(algorithm=na.parse(algorithm), **rules)


def measure(
    pipeline: object, request: GenerationRequest, rules: na.Schedule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the final latents, and the mean of each measure over all calls, layers and heads."""
    found: list[torch.Tensor] = []
    with na.apply(pipeline, schedule=rules) as handle:
        handle.observe(
            lambda call: found.append(compare(call.last_sample(), rules.algorithm, call.layer))
        )
        latents = sample(pipeline, request, output_type="latent")
    return latents, torch.stack(found).mean(dim=0)


def compare(call: BlockCall, config: na.SparseConfig, seed: int) -> torch.Tensor:
    """Compare the map that one call used with the map that its own tokens give."""
    fresh = select_blocks(call.q, call.k, call.layout, config, scale=call.scale)
    used = call.block_map
    recall = (used.mask & fresh.mask).sum() / fresh.mask.sum()
    outputs = [attend(call.q, call.k, call.v, x, scale=call.scale) for x in (used, fresh)]
    losses = measure_losses(call, seed=seed)
    return torch.tensor(
        [
            used.density,
            recall,
            distance(*outputs),
            losses.true_mass.mean(),
            losses.output_error.mean(),
        ],
        dtype=torch.float64,
    )


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Return the relative L2 distance of x to y."""
    return ((x.float() - y.float()).norm() / y.float().norm()).item()


if __name__ == "__main__":
    typer.run(main)
