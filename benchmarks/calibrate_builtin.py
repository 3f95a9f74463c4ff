"""Calibrated schedules of the built-in model against one algorithm in all layers, same budgets.

Calibrated on the last held-out prompts, compared with dense attention on the first ones.

    python -m benchmarks.calibrate_builtin runs/calibrate; then `python -m benchmarks.pages`
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import typer

from nabla_attn.calibrate.candidates import (
    DEFAULT,
    Choice,
    choose_within,
    one_for_all,
    read_candidates,
)
from nabla_attn.calibrate.run import Calibration
from nabla_attn.config import parse
from nabla_attn.evaluation.metrics import measure_ssim
from nabla_attn.generation.generate import generate
from nabla_attn.generation.pipeline import BUILTIN_DIRECTORY, load_pipeline, model_identity
from nabla_attn.generation.request import GenerationRequest, ModelDefaults, video_tokens
from nabla_attn.moving_shapes.judge import MovingShapesScorer
from nabla_attn.record import RunRecord, collect_versions, describe_device
from nabla_attn.schedule import Schedule

BUDGETS = (0.1, 0.23)
UNION = "nabla-0.2_sta-3-3-3"  # at the second budget


def main(
    work: Path,
    calibrated: int = 2,
    count: int = 12,
    output: Path = Path("benchmarks/results/calibrate.json"),
) -> None:
    """Calibrate, make every video, and write the record."""
    pipeline, defaults = load_pipeline("builtin"), ModelDefaults.load(BUILTIN_DIRECTORY)
    names = ("height", "width", "frames", "steps", "guidance")
    request = GenerationRequest("", **{name: getattr(defaults, name) for name in names})
    prompts = MovingShapesScorer().prompts(64)
    texts = [*DEFAULT, UNION, *(f"topk-{budget}" for budget in BUDGETS)]
    calibration = Calibration(pipeline, request, read_candidates(texts), work)
    losses = calibration.measure(prompts[-calibrated:])
    rows = []
    for budget in BUDGETS:
        singles = one_for_all(losses, calibration.candidates)
        chosen = choose_within(losses, calibration.candidates, density=budget)
        best = min((s for s in singles if s.density <= budget), key=lambda single: single.error)
        rows += [row("calibrated", budget, chosen, calibration.schedule(chosen))]
        rows += [row(f"{best.layers[0]} in all layers", budget, best, calibration.schedule(best))]
    union = next(s for s in singles if s.layers[0] == parse(UNION))
    rows.append(row(f"{UNION} in all layers", BUDGETS[-1], union, calibration.schedule(union)))
    for index, prompt in enumerate(prompts[:count]):
        measure(pipeline, replace(request, prompt=prompt), rows)
        sys.stderr.write(f"{index + 1}/{count} {prompt}\n")
    config = {"workload": "calibration", "calibrated": calibrated, "prompts": count}
    config |= {"tokens": list(video_tokens(pipeline, request)), "steps": request.steps}
    config |= model_identity(pipeline)
    numbers = {"results": [summarise(entry) for entry in rows]}
    device = describe_device(pipeline.device)
    RunRecord("calibrate", config, request.seed, collect_versions(), device, numbers).save(output)


def row(name: str, budget: float, choice: Choice, schedule: Schedule) -> dict:
    """Make a row: what is compared, and what calibration predicted for it."""
    predicted = {"density": choice.density, "error": choice.error}
    layers = [str(config) for config in choice.layers]
    entry = {"name": name, "budget": budget, "layers": layers, "predicted": predicted}
    return entry | {"schedule": schedule, "videos": []}


def measure(pipeline: object, request: GenerationRequest, rows: list[dict]) -> None:
    """Compare the videos of one prompt, one for each row, with the dense one."""
    dense, _ = generate(pipeline, request)
    for entry in rows:
        schedule = entry["schedule"]
        run = replace(request, sparse_algo=str(schedule.algorithm), schedule=schedule)
        frames, record = generate(pipeline, run)
        right = MovingShapesScorer().score(frames, request.prompt)
        assert right is not None
        ssim = np.mean(measure_ssim(frames, dense))
        entry["videos"].append((record.numbers["attention"]["density"], ssim, right["all"]))


def summarise(entry: dict) -> dict:
    """Return the means of a row."""
    del entry["schedule"]
    videos = np.array(entry.pop("videos"), dtype=float)
    means = dict(zip(("density", "ssim", "right"), videos.mean(axis=0).round(6), strict=True))
    return entry | {name: float(value) for name, value in means.items()}


if __name__ == "__main__":
    typer.run(main)
