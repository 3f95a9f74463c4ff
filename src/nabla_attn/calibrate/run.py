"""Calibration: prompts -> losses, kept on disk -> schedule."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nabla_attn.calibrate.candidates import (
    CandidateLosses,
    CandidateProbe,
    SeenCalls,
    mean_losses,
)
from nabla_attn.calibrate.units import to_schedule
from nabla_attn.calibrated_for import CalibratedFor
from nabla_attn.config import SparseConfig, parse
from nabla_attn.generation.generate import generate
from nabla_attn.generation.pipeline import model_identity
from nabla_attn.generation.request import GenerationRequest, video_tokens
from nabla_attn.progress import ProgressCallback
from nabla_attn.record import RunRecord, check_settings
from nabla_attn.schedule import Schedule
from nabla_attn.sizes import denoisers

EVERYTHING = "nabla-1"
"""Keeps every block in a sparse call, which observers see."""

KIND = "calibrate-heads"
Progress = Callable[[str], ProgressCallback]


def no_progress(label: str) -> ProgressCallback:
    """Tell nobody about a run's stages."""
    return lambda *stage: None


@dataclass(frozen=True)
class Calibration:
    """What is measured, and where it is kept.

    Attributes:
        pipeline: A text-to-video pipeline.
        request: The runs; prompt and algorithm are replaced, rules of its schedule stay.
        candidates: Algorithms that heads may use.
        folder: A record and a file of losses for each prompt; those that are there are not
            measured again.
        num_rows: Query tokens sampled per attention call.

    Raises:
        ValueError: The request's schedule has overrides or rules, which calibration is to find.
    """

    pipeline: Any
    request: GenerationRequest
    candidates: Sequence[SparseConfig]
    folder: Path
    num_rows: int = 16

    def __post_init__(self) -> None:
        rules = self.request.schedule
        if rules and (rules.layer_overrides or rules.step_overrides or rules.rules):
            raise ValueError("the schedule has overrides, which calibration is to find: drop them.")

    @cached_property
    def identity(self) -> dict[str, str | None]:
        """What the videos depend on besides the request; read once, as it reads the model."""
        return model_identity(self.pipeline)

    def measure(
        self, prompts: Sequence[str], *, progress: Progress = no_progress
    ) -> CandidateLosses:
        """Make a video of each prompt with everything kept, and measure candidates on the way.

        Args:
            prompts: What the videos show.
            progress: From a prompt to what is told about the stages of its run.

        Raises:
            ValueError: A record in the folder was made with other settings, or by a version that
                measured less.
        """
        for index, text in enumerate(prompts):
            self._record(index, text, progress)
        return mean_losses(self.each(len(prompts)))

    def each(self, count: int) -> list[CandidateLosses]:
        """The losses of the first measured prompts, one by one."""
        return [CandidateLosses.load(self._losses(index)) for index in range(count)]

    def seen(self) -> SeenCalls:
        """What the calls of the first prompt's run were, once it is measured."""
        values = dict(RunRecord.load(self._path(0)).numbers["calls"])
        return SeenCalls(**values | {name: tuple(values[name]) for name in ("text", "tokens")})

    def schedule(self, picked: np.ndarray) -> Schedule:
        """The schedule of a choice, with the rules of the request's own, and what it is good for.

        Args:
            picked: Index of the candidate, [steps, layers, heads].
        """
        _, layers, heads = picked.shape
        made_for = CalibratedFor(
            model=type(denoisers(self.pipeline)[0]).__name__,
            layers=layers,
            heads=heads,
            tokens=video_tokens(self.pipeline, self.request),
            steps=self.request.steps,
        )
        schedule = to_schedule(picked, self.candidates, self.request.schedule)
        return replace(schedule, calibrated_for=made_for)

    def run_of(self, prompt: str, schedule: Schedule | None) -> GenerationRequest:
        """The request of a prompt under a schedule; None is dense."""
        algorithm = "dense" if schedule is None else str(schedule.algorithm)
        return replace(self.request, prompt=prompt, sparse_algo=algorithm, schedule=schedule)

    def settings_of(self, run: GenerationRequest) -> dict[str, Any]:
        """What a record of a run holds, and is held against when it is found again."""
        return run.to_dict() | self.identity

    def base(self, algorithm: SparseConfig) -> Schedule:
        """The rules of the request with an algorithm."""
        if self.request.schedule is None:
            return Schedule(algorithm=algorithm)
        return replace(self.request.schedule, algorithm=algorithm)

    def _path(self, index: int) -> Path:
        return self.folder / f"p{index:04d}.json"

    def _losses(self, index: int) -> Path:
        return self._path(index).with_suffix(".safetensors")

    def _record(self, index: int, prompt: str, progress: Progress) -> None:
        path = self._path(index)
        run = self.run_of(prompt, self.base(parse(EVERYTHING)))
        settings = self.settings_of(run)
        settings |= {"candidates": list(map(str, self.candidates)), "num_rows": self.num_rows}
        if path.is_file():
            if RunRecord.load(path).kind != KIND:
                raise ValueError(
                    f"{path} was measured by layer, without heads and steps. Choose another "
                    "--output, or remove the folder to measure again."
                )
            check_settings(path, settings)
            return
        probe = CandidateProbe(self.candidates, run.steps, num_rows=self.num_rows)
        _, record = generate(
            self.pipeline, run, on_progress=progress(prompt), on_apply=probe.attach
        )
        # The record goes last: with it, the prompt is measured.
        probe.losses().save(self._losses(index))
        numbers = {"calls": asdict(probe.seen())}
        replace(record, kind=KIND, config=settings, numbers=numbers).save(path)
