"""Judge a pipeline on held-out prompts, with any attention algorithm; interrupted runs go on."""

import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nabla_attn.files import whole_file
from nabla_attn.generation.generate import generate
from nabla_attn.generation.pipeline import model_identity
from nabla_attn.generation.request import GenerationRequest
from nabla_attn.moving_shapes.judge import JUDGE, score
from nabla_attn.moving_shapes.scene import Scene, describe, held_out_scenes, sample_scene
from nabla_attn.record import RunRecord, check_settings, collect_versions, describe_device


def trained_scenes(count: int) -> list[Scene]:
    """Scenes of one shape from the combinations that training shows."""
    # Training draws its seeds from text, so that none of these is among its own.
    return [sample_scene(seed) for seed in range(count)]


SCENES = {"held-out": held_out_scenes, "trained": trained_scenes}
KEPT = ("density", "transformer_seconds")


def summarise(prompts: list[dict[str, Any]]) -> dict[str, Any]:
    """Share of right answers by attribute, mean density, median seconds in the transformer."""
    return {
        "right": {
            name: round(statistics.fmean(float(result["right"][name]) for result in prompts), 4)
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
    captions: str = "held-out",
    videos: Path | None = None,
    path: Path | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> RunRecord:
    """Generate a video for each of `count` prompts and judge it.

    Prompt i starts from the noise of seed i, whatever the algorithm.

    Args:
        pipeline: A text-to-video pipeline of diffusers.
        request: What to ask for; its prompt and seed are replaced.
        count: Number of prompts.
        captions: "held-out" combinations, or "trained" ones, which training shows.
        videos: The folder where frames are kept without loss, so that a later judge reads the same
            videos. What it holds is not generated again; it must belong to one model and algorithm.
        path: Where the record is kept. Prompts that it already holds are not run again.
        report: Called with (prompts done, prompts).

    Returns:
        The record: {"prompts": [{"prompt", "right", "density", "transformer_seconds"}, ...]} and
        their summary.

    Raises:
        ValueError: The file at `path` was made with other settings.
    """
    config = request.to_dict() | model_identity(pipeline) | {"judge": JUDGE, "captions": captions}
    del config["prompt"], config["seed"]
    prompts = _kept_prompts(path, config)
    for index, scene in enumerate(SCENES[captions](count)):
        if index < len(prompts):
            continue
        asked = replace(request, prompt=describe(scene), seed=index)
        video, numbers = make_video(pipeline, asked, videos)
        prompts.append({"prompt": describe(scene), "right": score(video, scene)} | numbers)
        if path is not None:
            _record(config, pipeline, prompts).save(path)
        report(index + 1, count)
    return _record(config, pipeline, prompts[:count])


def make_video(
    pipeline: Any, request: GenerationRequest, videos: Path | None
) -> tuple[np.ndarray, dict[str, float]]:
    """The frames of a request, and its density and seconds.

    Args:
        pipeline: A text-to-video pipeline of diffusers.
        request: The video to make.
        videos: The folder where frames are kept by seed, and taken from where it has them.
    """
    path = None if videos is None else videos / f"{request.seed:04d}.npz"
    if path is not None and path.exists():
        with np.load(path) as kept:
            return kept["frames"], {name: float(kept[name]) for name in KEPT}
    frames, run = generate(pipeline, request)
    numbers = {
        "density": run.numbers["attention"]["density"],
        "transformer_seconds": round(run.numbers["seconds"]["transformer"], 3),
    }
    if path is not None:
        with whole_file(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, frames=frames, **numbers)
    return frames, numbers


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
