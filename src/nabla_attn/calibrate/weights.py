"""The error model: what an error in a layer, in a range of steps, does to the final latents.

A layer is made sparse alone in a range of steps, everything else dense, and the final latents are
compared with those of a dense run. Errors of different units are taken as independent, so their
squares add up:

    distance² = sum over units of weight x noise

with noise the squared error of a head's output over the squared length of its layer's output. A
weight is the squared distance that a layer caused alone over the noise that it had then. Sparse
errors are used, and not random noise of their size: they are systematic, and those of both guidance
branches are alike.
"""

import hashlib
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nabla_attn.calibrate.candidates import CandidateLosses
from nabla_attn.calibrate.run import Calibration, Progress, no_progress
from nabla_attn.calibrate.seconds import clock_of
from nabla_attn.calibrate.units import Units, taken
from nabla_attn.files import whole_file
from nabla_attn.generation.call import StageClock, sample
from nabla_attn.generation.request import GenerationRequest
from nabla_attn.head_rules import Rule
from nabla_attn.models import replaced
from nabla_attn.progress import ProgressCallback
from nabla_attn.record import RunRecord, check_settings, collect_versions, describe_device
from nabla_attn.schedule import Schedule

REFERENCE_ERROR = 0.2
"""The probing candidate is the one whose mean error is nearest to this: large enough to be seen in
bf16, small enough for squares to add up."""


@dataclass(frozen=True)
class Latents:
    """Runs of a calibration that end at the latents, kept in its folder.

    Attributes:
        calibration: The calibration.
        folder: Where they are kept.
    """

    calibration: Calibration
    folder: Path

    def distance(
        self, prompt: str, schedule: Schedule, *, progress: Progress = no_progress
    ) -> float:
        """Distance of the final latents under a schedule from dense ones, over the latter's length.

        Args:
            prompt: What the video shows.
            schedule: The schedule.
            progress: From a label to what is told about the stages of a run.

        Raises:
            ValueError: The record of this distance was made with other settings.
        """
        run = self.calibration.run_of(prompt, schedule)
        path = self.folder / f"{_name(run)}.json"
        settings = self.calibration.settings_of(run)
        if path.is_file():
            return float(check_settings(path, settings).numbers["distance"])
        dense = self._dense(prompt, progress)
        there, _ = final_latents(self.calibration.pipeline, run, progress(_label(schedule)))
        length = dense.norm().clamp(min=torch.finfo(torch.float32).tiny)
        distance = float((there - dense).norm() / length)
        record = RunRecord(
            kind="calibrate-distance",
            config=settings,
            seed=run.seed,
            versions=collect_versions(),
            device=describe_device(self.calibration.pipeline.device),
            numbers={"distance": distance},
        )
        record.save(path)
        return distance

    def _dense(self, prompt: str, progress: Progress) -> torch.Tensor:
        from safetensors.torch import load_file, save_file

        run = self.calibration.run_of(prompt, None)
        # Other weights or settings are another name.
        path = self.folder / f"{_name(run, self.calibration.identity)}.safetensors"
        if path.is_file():
            return load_file(path)["latents"]
        latents, _ = final_latents(self.calibration.pipeline, run, progress("dense"))
        with whole_file(path) as temporary:
            save_file({"latents": latents}, temporary)
        return latents


def final_latents(
    pipeline: Any, request: GenerationRequest, on_progress: ProgressCallback
) -> tuple[torch.Tensor, float]:
    """The latents that a request ends at, fp32 on the CPU, and seconds in the transformer.

    Seconds are by `clock_of` the device.
    """
    device = getattr(pipeline, "_execution_device", pipeline.device)
    clock = StageClock(device, request.steps, on_progress, clock_of(device))
    algorithm = None if request.is_dense else request.sparse_algo
    with replaced(pipeline, algorithm, schedule=request.schedule), clock.watch(pipeline):
        latents = sample(pipeline, request, on_step_end=clock.on_step_end, output_type="latent")
    found = torch.as_tensor(latents).detach().float().cpu().contiguous()
    return found, float(clock.seconds()["transformer"])


def measure_weights(
    latents: Latents,
    losses: CandidateLosses,
    units: Units,
    prompts: Sequence[str],
    *,
    progress: Progress = no_progress,
) -> np.ndarray:
    """The weight of every step and layer, float64 [steps, layers, 1, 1].

    Args:
        latents: Where runs are kept.
        losses: What was measured of the candidates.
        units: The ranges of steps.
        prompts: What the videos show; weights are means over them.
        progress: From a label to what is told about the stages of a run.
    """
    calibration = latents.calibration
    steps, layers, _ = units.shape
    number = reference(losses)
    weights = np.zeros((steps, layers, 1, 1))
    for part in np.array_split(np.arange(steps), units.ranges):
        for layer in range(layers):
            noise = losses.noise[part, layer, :, number].sum()
            if noise == 0:
                continue
            rule = Rule(
                algorithm=calibration.candidates[number],
                layers=(layer,),
                steps=tuple(part.tolist()),
            )
            alone = replace(calibration.base(calibration.candidates[-1]), rules=(rule,))
            found = [latents.distance(text, alone, progress=progress) for text in prompts]
            weights[part, layer] = np.square(found).mean() / noise
    return weights


def reference(losses: CandidateLosses) -> int:
    """The candidate that makes layers sparse alone; see `REFERENCE_ERROR`."""
    error = losses.error.mean(axis=(0, 1, 2))
    sparse = np.where(error > 0, np.abs(error - REFERENCE_ERROR), np.inf)
    return int(sparse.argmin())


def predicted_distance(losses: CandidateLosses, weights: np.ndarray, picked: np.ndarray) -> float:
    """The distance of the final latents that the model expects of a choice."""
    return float(np.sqrt(taken(weights * losses.noise, picked).sum()))


@dataclass(frozen=True)
class Fit:
    """How well predictions agree with what was measured on other prompts.

    Attributes:
        rank_correlation: Spearman's, over schedules; None for fewer than three.
        ratio: Geometric mean of measured over predicted.
        spread: Factor within which two thirds of the ratios lie around it.
    """

    rank_correlation: float | None
    ratio: float
    spread: float


def fit_of(predicted: Sequence[float], measured: Sequence[float]) -> Fit:
    """Hold predicted distances against measured ones; schedules that lose nothing are left out."""
    from scipy.stats import spearmanr

    both = [(p, m) for p, m in zip(predicted, measured, strict=True) if p > 0 and m > 0]
    if not both:
        return Fit(None, float("nan"), float("nan"))
    p, m = np.array(both).T
    logs = np.log(m / p)
    rank = float(spearmanr(p, m).statistic) if len(both) > 2 else None
    return Fit(rank, float(np.exp(logs.mean())), float(np.exp(logs.std())))


def _label(schedule: Schedule) -> str:
    return textwrap.shorten(str(schedule), 60, placeholder="...")


def _name(run: GenerationRequest, extra: Any = None) -> str:
    text = json.dumps([run.to_dict(), extra], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
