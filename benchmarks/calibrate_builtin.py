"""Calibrated schedules of the built-in model against one algorithm everywhere, same density.

Calibrated on the last held-out prompts; the final latents of the first ones are compared with
dense. What was measured is kept in the folder, so an interrupted run goes on.

    python -m benchmarks.calibrate_builtin runs/calibrate; then `python -m benchmarks.pages`
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import typer

from nabla_attn.calibrate.budget import choose_by_density
from nabla_attn.calibrate.candidates import CandidateLosses, read_candidates
from nabla_attn.calibrate.job import RUNS
from nabla_attn.calibrate.run import Calibration
from nabla_attn.calibrate.units import Choice, Units, one_for_all
from nabla_attn.calibrate.weights import (
    Latents,
    fit_of,
    measure_weights,
    predicted_distance,
    reference,
)
from nabla_attn.generation.pipeline import BUILTIN_DIRECTORY, load_pipeline
from nabla_attn.generation.request import GenerationRequest, ModelDefaults, video_tokens
from nabla_attn.moving_shapes.judge import MovingShapesScorer
from nabla_attn.record import RunRecord, collect_versions, describe_device

CANDIDATES = ("topk-*_tail-first", "topk-*", "nabla-*_tail-first", "nabla-*")
ROWS = 32  # query tokens sampled in each call


def main(
    work: Path,
    density: float = 0.12,
    ranges: int = 2,
    calibrated: int = 2,
    weighted: int = 1,
    count: int = 4,
    output: Path = Path("benchmarks/results/calibrate.json"),
) -> None:
    """Calibrate, run every schedule on held-out prompts, and write the record."""
    pipeline, defaults = load_pipeline("builtin"), ModelDefaults.load(BUILTIN_DIRECTORY)
    names = ("height", "width", "frames", "steps", "guidance")
    request = GenerationRequest("", **{name: getattr(defaults, name) for name in names})
    prompts = MovingShapesScorer().prompts(64)
    calibration = Calibration(pipeline, request, read_candidates(CANDIDATES), work, ROWS)
    losses = calibration.measure(prompts[-calibrated:])
    units = Units(losses.density.shape[:3], ranges)
    runs = Latents(calibration, work / RUNS)
    weights = measure_weights(runs, losses, units, prompts[-weighted:], progress=tell)
    choices = choose(losses, weights, ranges, density)
    config = {
        "workload": "calibration",
        "density": density,
        "ranges": ranges,
        "calibrated": calibrated,
        "weighted": weighted,
        "num_rows": ROWS,
        "candidates": list(map(str, calibration.candidates)),
        "reference": str(calibration.candidates[reference(losses)]),
        "tokens": list(video_tokens(pipeline, request)),
        "steps": request.steps,
        **calibration.identity,
    }
    measured: dict[str, list[float]] = {name: [] for name in choices}
    for done, prompt in enumerate(prompts[:count]):
        for name, choice in choices.items():
            schedule = calibration.schedule(choice.picked)
            measured[name].append(runs.distance(prompt, schedule, progress=tell))
        results = [
            row(calibration, losses, weights, name, choice, measured[name])
            for name, choice in choices.items()
        ]
        fit = fit_of(
            [result["predicted"] for result in results],
            [float(np.mean(result["distances"])) for result in results],
        )
        numbers: dict[str, Any] = {"results": results, "fit": vars(fit)}
        numbers["weights"] = np.round(weights[..., 0, 0], 4).tolist()
        settings = config | {"prompts": done + 1}
        device = describe_device(pipeline.device)
        record = RunRecord("calibrate", settings, request.seed, collect_versions(), device, numbers)
        record.save(output)


def choose(
    losses: CandidateLosses, weights: np.ndarray, ranges: int, density: float
) -> dict[str, Choice]:
    """Choose schedules of one density: by head and by layer, weighted or not, and single ones."""
    shape = losses.density.shape[:3]
    weighted = weights * losses.noise
    singles = [one for one in one_for_all(losses) if one.density <= density]
    best = min(singles, key=lambda one: one.error)
    plain = [one for one in singles if one.picked.flat[0] in UNESTIMATED]
    return {
        "by head, weighted": choose_by_density(losses, Units(shape, ranges), weighted, density),
        "by head": choose_by_density(losses, Units(shape, ranges), losses.error, density),
        "by layer, weighted": choose_by_density(
            losses, Units(shape, ranges, "layer"), weighted, density
        ),
        "by layer, all steps": choose_by_density(
            losses, Units(shape, 1, "layer"), losses.error, density
        ),
        "best algorithm everywhere": best,
        "best without a tail": min(plain, key=lambda one: one.error),
    }


UNESTIMATED = [
    number for number, config in enumerate(read_candidates(CANDIDATES)) if config.tail is None
]


def row(
    calibration: Calibration,
    losses: CandidateLosses,
    weights: np.ndarray,
    name: str,
    choice: Choice,
    distances: list[float],
) -> dict[str, Any]:
    """Make a row: what calibration said of a schedule, and distances of the final latents."""
    schedule = calibration.schedule(choice.picked)
    return {
        "name": name,
        "algorithm": str(schedule.algorithm),
        "rules": [rule.to_dict() for rule in schedule.rules],
        "density": round(choice.density, 6),
        "error": round(choice.error, 6),
        "predicted": round(predicted_distance(losses, weights, choice.picked), 6),
        "distances": [round(value, 6) for value in distances],
    }


def tell(label: str) -> Any:
    """Say on stderr which run begins."""
    sys.stderr.write(f"{label}\n")
    return lambda *stage: None


if __name__ == "__main__":
    typer.run(main)
