"""Measure what classifier-free guidance does to the errors of sparse attention.

The built-in model samples dense videos with guidance, and every call of its transformer is repeated
with sparse attention on the same latents, without the model's adapters and with them.

python -m benchmarks.guidance_error; then `python -m benchmarks.pages` makes the table.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor

import nabla_attn as na
from benchmarks.map_reuse import distance
from nabla_attn.generation.call import sample
from nabla_attn.generation.pipeline import BUILTIN_DIRECTORY, load_pipeline, model_identity
from nabla_attn.generation.request import GenerationRequest, ModelDefaults, video_tokens
from nabla_attn.moving_shapes.scene import describe, held_out_scenes
from nabla_attn.record import RunRecord, collect_versions, describe_device

FRAMES = ("nabla-0.7_block-1-16-16", "nabla-0.4_block-1-16-16")
ALGORITHMS = ("nabla-0.9", "nabla-0.7", "nabla-0.4", "nabla-0.2_sta-3-3-3", *FRAMES)
Call = tuple[tuple[Any, ...], dict[str, Any], Tensor]


def main(prompts: int = 4, output: Path = Path("benchmarks/results/guidance_error.json")) -> None:
    """Measure every algorithm on every step of every prompt and write the record."""
    pipeline, defaults = load_pipeline("builtin"), ModelDefaults.load(BUILTIN_DIRECTORY)
    names = ("height", "width", "frames", "steps", "guidance")
    settings: dict[str, Any] = {name: getattr(defaults, name) for name in names}
    adapted = load_pipeline("builtin", lora=["builtin"])
    students = [(name, pipeline) for name in ALGORITHMS] + [(name, adapted) for name in FRAMES]
    found: list[list[Tensor]] = [[] for _ in students]
    texts = [describe(scene) for scene in held_out_scenes(prompts)]
    for seed, text in enumerate(texts):
        request = GenerationRequest(text, seed=seed, **settings)
        calls = record_calls(pipeline, request)
        for (name, student), errors in zip(students, found, strict=True):
            errors += measure(student.transformer, calls, name, defaults.guidance)
        sys.stderr.write(f"{seed + 1}/{prompts} {text}\n")
    rows = [
        {"algorithm": name, "adapters": student is adapted} | summarise(errors)
        for (name, student), errors in zip(students, found, strict=True)
    ]
    config = {"workload": "guidance", "prompts": texts, **settings} | model_identity(pipeline)
    config["tokens"] = list(video_tokens(pipeline, request))
    device = describe_device(pipeline.device)
    RunRecord("guidance_error", config, 0, collect_versions(), device, {"results": rows}).save(
        output
    )


def record_calls(pipeline: Any, request: GenerationRequest) -> list[Call]:
    """Record the arguments and output of every call of the transformer, which take turns.

    Calls with the prompt and without it follow each other.
    """
    calls: list[Call] = []

    def keep(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((args, kwargs, output[0]))

    hook = pipeline.transformer.register_forward_hook(keep, with_kwargs=True)
    try:
        sample(pipeline, request, output_type="latent")
    finally:
        hook.remove()
    return calls


def summarise(steps: list[Tensor]) -> dict[str, float]:
    """Return the means over all steps, and the factor by which guidance multiplies errors."""
    prompted, free, guided, kept = torch.stack(steps).mean(dim=0).tolist()
    numbers = {"prompted": prompted, "free": free, "guided": guided, "kept": kept}
    numbers["ratio"] = guided / prompted
    return {name: round(value, 4) for name, value in numbers.items()}


@torch.no_grad()
def measure(transformer: Any, calls: list[Call], algorithm: str, guidance: float) -> list[Tensor]:
    """Measure each step: three relative errors, and the share of the prompt's effect that is kept.

    The errors are those of the prediction with the prompt, of that without it, and of the guided
    one.
    """
    with na.apply(transformer, algorithm):
        sparse = [transformer(*args, **kwargs)[0] for args, kwargs, _ in calls]
    dense = [output for _, _, output in calls]
    errors = []
    for place in range(0, len(calls), 2):
        prompted, free = ([x[place + turn].float() for x in (sparse, dense)] for turn in (0, 1))
        guided = [b + guidance * (a - b) for a, b in zip(prompted, free, strict=True)]
        pairs = [distance(*pair) for pair in (prompted, free, guided)]
        errors.append(torch.tensor([*pairs, kept_effect(prompted, free)]))
    return errors


def kept_effect(prompted: list[Tensor], free: list[Tensor]) -> float:
    """Return the share of the prompt's effect that sparse attention keeps.

    The effect is the difference of the predictions with and without the prompt. Of the sparse one,
    its part along the dense one counts.

    Args:
        prompted: The sparse and the dense prediction with the prompt.
        free: The sparse and the dense prediction without it.
    """
    sparse, dense = (a - b for a, b in zip(prompted, free, strict=True))
    return float((sparse * dense).sum() / dense.square().sum())


if __name__ == "__main__":
    typer.run(main)
