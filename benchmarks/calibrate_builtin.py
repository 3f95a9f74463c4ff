"""Calibrated schedules of the built-in model against one algorithm everywhere, same density.

Errors of attention's output are those of prompts that a schedule was not chosen on, each held-out
prompt in turn. Final latents are compared with dense ones on further prompts, where asked for. What
was measured is kept in the folder, so an interrupted run goes on.

    python -m benchmarks.calibrate_builtin runs/calibrate --weighted 1 --count 8
    python -m benchmarks.pages
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import typer

from nabla_attn.calibrate.budget import choose_by_density
from nabla_attn.calibrate.candidates import CandidateLosses, mean_losses, read_candidates
from nabla_attn.calibrate.job import RUNS
from nabla_attn.calibrate.run import Calibration
from nabla_attn.calibrate.units import Units, one_for_all, taken
from nabla_attn.calibrate.weights import (
    Latents,
    fit_of,
    measure_weights,
    predicted_distance,
    reference,
)
from nabla_attn.files import write_text
from nabla_attn.generation.pipeline import BUILTIN_DIRECTORY, load_pipeline
from nabla_attn.generation.request import GenerationRequest, ModelDefaults, video_tokens
from nabla_attn.generation.schedules import FOLDER
from nabla_attn.moving_shapes.judge import MovingShapesScorer
from nabla_attn.record import RunRecord, collect_versions, describe_device

CANDIDATES = ("topk-*_tail-first", "topk-*", "nabla-*_tail-first", "nabla-*")
SINGLES = ("topk-0.05_tail-first", "topk-0.1_tail-first", "topk-0.2_tail-first")
"""Algorithms everywhere whose densities are the budgets of the schedules beside them."""

UNITS = {
    "by head in both steps": (2, "head"),
    "by head": (1, "head"),
    "by layer in both steps": (2, "layer"),
    "by layer": (1, "layer"),
}
SHIPPED = ("builtin-fast", 0.12, "by head in both steps")
ROWS = 32  # query tokens sampled in each call


def main(
    work: Path,
    calibrated: int = 2,
    weighted: int = 0,
    count: int = 0,
    output: Path = Path("benchmarks/results/calibrate_heads.json"),
    shipped: Path = FOLDER,
) -> None:
    """Calibrate, compare, write the record and the schedule that the package brings.

    Args:
        work: Folder of what is measured.
        calibrated: Prompts whose heads are measured, from the end of the held-out ones.
        weighted: How many of them also give weights of the error model.
        count: Further prompts whose final latents are compared.
        output: The record.
        shipped: Folder of the schedule.
    """
    pipeline, defaults = load_pipeline("builtin"), ModelDefaults.load(BUILTIN_DIRECTORY)
    asked = ("height", "width", "frames", "steps", "guidance")
    request = GenerationRequest("", **{name: getattr(defaults, name) for name in asked})
    prompts = MovingShapesScorer().prompts(64)
    calibration = Calibration(pipeline, request, read_candidates(CANDIDATES), work, ROWS)
    measured = prompts[-calibrated:]
    calibration.measure(measured, progress=tell)
    each = calibration.each(len(measured))
    names = list(map(str, calibration.candidates))
    numbers: dict[str, Any] = {"results": held_out(each, names)}
    schedule = calibration.schedule(choose(mean_losses(each), *SHIPPED[1:]))
    write_text(shipped / f"{SHIPPED[0]}.json", schedule.to_json() + "\n")
    config = {
        "workload": "calibration by head",
        "calibrated": calibrated,
        "num_rows": ROWS,
        "candidates": names,
        "tokens": list(video_tokens(pipeline, request)),
        "steps": request.steps,
        **calibration.identity,
    }

    def save() -> None:
        versions, device = collect_versions(), describe_device(pipeline.device)
        RunRecord("calibrate-heads", config, request.seed, versions, device, numbers).save(output)

    save()
    runs = Latents(calibration, work / RUNS)
    weights = None
    if weighted:
        units = Units(each[0].density.shape[:3], UNITS[SHIPPED[2]][0])
        losses = mean_losses(each)
        weights = measure_weights(runs, losses, units, measured[:weighted], progress=tell)
        config |= {"weighted": weighted, "reference": names[reference(losses)]}
        numbers["weights"] = np.round(weights[..., 0, 0], 4).tolist()
    for done in range(count):
        numbers["latents"] = latents_of(calibration, runs, each, weights, prompts[: done + 1])
        save()


def choose(losses: CandidateLosses, density: float, units: str) -> np.ndarray:
    """Choose a schedule within a density, without weights."""
    ranges, by = UNITS[units]
    units_of = Units(losses.density.shape[:3], ranges, by)
    return choose_by_density(losses, units_of, losses.error, density).picked


def held_out(each: list[CandidateLosses], names: list[str]) -> list[dict[str, Any]]:
    """Choose on all prompts but one and take the errors of that one; means over prompts."""
    rows = []
    for single in SINGLES:
        number = names.index(single)
        for name in (*UNITS, f"{single} everywhere"):
            found = []
            for index, other in enumerate(each):
                losses = mean_losses([*each[:index], *each[index + 1 :]])
                picked = np.full(losses.density.shape[:3], number)
                if name in UNITS:
                    budget = taken(losses.density, picked).mean()
                    picked = choose(losses, budget, name)
                errors = taken(other.error, picked)
                density = taken(other.density, picked).mean()
                found.append((density, errors.mean(), np.percentile(errors, 95)))
            means = [round(float(value), 6) for value in np.mean(found, axis=0)]
            row = dict(zip(("density", "error", "error_95"), means, strict=True))
            rows.append({"budget": single, "name": name} | row)
    return rows


def latents_of(
    calibration: Calibration,
    runs: Latents,
    each: list[CandidateLosses],
    weights: np.ndarray | None,
    prompts: list[str],
) -> dict[str, Any]:
    """Compare final latents under schedules of one density with dense ones."""
    losses, names = mean_losses(each), list(map(str, calibration.candidates))
    single = SINGLES[1]
    picks = {f"{single} everywhere": np.full(losses.density.shape[:3], names.index(single))}
    budget = taken(losses.density, next(iter(picks.values()))).mean()
    picks[f"{SHIPPED[2]}, equal density"] = choose(losses, budget, SHIPPED[2])
    picks["topk-0.1 everywhere"] = one_for_all(losses)[names.index("topk-0.1")].picked
    rows = []
    for name, picked in picks.items():
        schedule = calibration.schedule(picked)
        distances = [runs.distance(prompt, schedule, progress=tell) for prompt in prompts]
        row: dict[str, Any] = {
            "name": name,
            "density": round(float(taken(losses.density, picked).mean()), 6),
            "distances": [round(value, 6) for value in distances],
        }
        if weights is not None:
            row["predicted"] = round(predicted_distance(losses, weights, picked), 6)
        rows.append(row)
    found: dict[str, Any] = {"rows": rows, "prompts": len(prompts)}
    if weights is not None:
        predicted = [row["predicted"] for row in rows]
        found["fit"] = vars(fit_of(predicted, [np.mean(row["distances"]) for row in rows]))
    return found


def tell(label: str) -> Any:
    """Say on stderr which run begins."""
    sys.stderr.write(f"{label}\n")
    return lambda *stage: None


if __name__ == "__main__":
    typer.run(main)
