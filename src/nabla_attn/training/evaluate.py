"""Judge a pipeline on held-out prompts, with any attention algorithm; interrupted runs resume."""

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nabla_attn.world.caption import describe
from nabla_attn.world.judge import score
from nabla_attn.world.scene import held_out_scenes


def generate_video(pipeline: Any, prompt: str, seed: int, **settings: Any) -> NDArray[np.uint8]:
    """Run a pipeline once and return uint8 [frames, height, width, 3].

    Args:
        pipeline: A text-to-video pipeline of diffusers.
        prompt: What to show.
        seed: Seeds the first noise.
        **settings: height, width, num_frames, num_inference_steps, guidance_scale.
    """
    generator = torch.Generator().manual_seed(seed)
    video = pipeline(prompt, generator=generator, output_type="np", **settings).frames[0]
    return np.rint(np.clip(video, 0, 1) * 255).astype(np.uint8)


def _write(record: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, path)


def summarise(prompts: list[dict[str, Any]]) -> dict[str, Any]:
    """Share of right answers by attribute, and the median seconds and density of a video."""
    if not prompts:
        return {}
    attributes = prompts[0]["right"]
    summary: dict[str, Any] = {
        name: round(statistics.fmean(p["right"][name] for p in prompts), 4) for name in attributes
    }
    summary["seconds"] = round(statistics.median(p["seconds"] for p in prompts), 2)
    densities = [p["density"] for p in prompts if p.get("density") is not None]
    if densities:
        summary["density"] = round(statistics.fmean(densities), 4)
    return summary


def judge_pipeline(
    pipeline: Any,
    count: int,
    *,
    settings: dict[str, Any],
    path: Path | None = None,
    about: dict[str, Any] | None = None,
    density: Callable[[], float | None] = lambda: None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Generate a video for each of `count` held-out prompts and judge it.

    Prompt i uses seed i, so that different algorithms start from the same noise.

    Args:
        pipeline: A text-to-video pipeline of diffusers, with any attention applied.
        count: Number of prompts.
        settings: As `generate_video` takes them.
        path: Where the record is kept; prompts that it already holds are not run again.
        about: Added to the record: algorithm, schedule, versions. A record about something else
            is not continued.
        density: Read after every video.
        report: Called with (prompts done, prompts).

    Returns:
        {"about", "settings", "summary", "prompts": one {"prompt", "right", "seconds"} each}.

    Raises:
        ValueError: The file at `path` was made with other settings.
    """
    record: dict[str, Any] = {"about": about or {}, "settings": settings, "prompts": []}
    if path is not None and path.exists():
        kept = json.loads(path.read_text())
        if (kept["about"], kept["settings"]) != (record["about"], settings):
            raise ValueError(f"{path} was made with other settings: remove it or choose a new name")
        record["prompts"] = kept["prompts"]
    for index, scene in enumerate(held_out_scenes(count)):
        if index < len(record["prompts"]):
            continue
        prompt = describe(scene)
        started = time.perf_counter()
        video = generate_video(pipeline, prompt, index, **settings)
        result = {"prompt": prompt, "right": score(video, scene)}
        result["seconds"] = round(time.perf_counter() - started, 2)
        result["density"] = density()
        record["prompts"].append(result)
        record["summary"] = summarise(record["prompts"])
        if path is not None:
            _write(record, path)
        report(index + 1, count)
    return record
