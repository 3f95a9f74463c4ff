"""Judge a pipeline on held-out prompts, with any attention algorithm; interrupted runs go on."""

import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from nabla_attn.generation.generate import generate
from nabla_attn.generation.pipeline import model_identity
from nabla_attn.generation.request import GenerationRequest
from nabla_attn.moving_shapes.judge import score
from nabla_attn.moving_shapes.scene import describe, held_out_scenes
from nabla_attn.record import RunRecord, check_settings, collect_versions, describe_device


def summarise(prompts: list[dict[str, Any]]) -> dict[str, Any]:
    """Share of right answers by attribute, mean density, median seconds in the transformer."""
    return {
        "right": {
            name: round(statistics.fmean(result["right"][name] for result in prompts), 4)
            for name in prompts[0]["right"]
        },
        "density": round(statistics.fmean(result["density"] for result in prompts), 4),
        "transformer_seconds": round(
            statistics.median(result["transformer_seconds"] for result in prompts), 3
        ),
    }


def judge_prompts(
    pipeline: Any,
    request: GenerationRequest,
    count: int,
    *,
    path: Path | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> RunRecord:
    """Generate a video for each of `count` held-out prompts and judge it.

    Prompt i starts from the noise of seed i, whatever the algorithm.

    Args:
        pipeline: A text-to-video pipeline of diffusers.
        request: What to ask for; its prompt and seed are replaced.
        count: Number of prompts.
        path: Where the record is kept. Prompts that it already holds are not run again.
        report: Called with (prompts done, prompts).

    Returns:
        The record: {"prompts": [{"prompt", "right", "density", "transformer_seconds"}, ...]} and
        their summary.

    Raises:
        ValueError: The file at `path` was made with other settings.
    """
    config = request.to_dict() | model_identity(pipeline)
    del config["prompt"], config["seed"]
    prompts = _kept_prompts(path, config)
    for index, scene in enumerate(held_out_scenes(count)):
        if index < len(prompts):
            continue
        video, run = generate(pipeline, replace(request, prompt=describe(scene), seed=index))
        prompts.append(
            {
                "prompt": describe(scene),
                "right": score(video, scene),
                "density": run.numbers["attention"]["density"],
                "transformer_seconds": round(run.numbers["seconds"]["transformer"], 3),
            }
        )
        if path is not None:
            _record(config, pipeline, prompts).save(path)
        report(index + 1, count)
    return _record(config, pipeline, prompts[:count])


def _kept_prompts(path: Path | None, config: dict[str, Any]) -> list[dict[str, Any]]:
    if path is None or not path.exists():
        return []
    return list(check_settings(path, config).numbers["prompts"])


def _record(config: dict[str, Any], pipeline: Any, prompts: list[dict[str, Any]]) -> RunRecord:
    return RunRecord(
        kind="judge",
        config=config,
        seed=0,
        versions=collect_versions(),
        device=describe_device(pipeline.device),
        numbers={"count": len(prompts), "summary": summarise(prompts), "prompts": prompts},
    )
