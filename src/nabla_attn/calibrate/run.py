"""Calibration: prompts -> losses, kept on disk -> schedule."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nabla_attn.calibrate.candidates import CandidateLosses, CandidateProbe, Choice
from nabla_attn.config import SparseConfig, parse
from nabla_attn.generation.generate import generate
from nabla_attn.generation.pipeline import model_identity
from nabla_attn.generation.request import GenerationRequest
from nabla_attn.progress import ProgressCallback
from nabla_attn.record import RunRecord, check_settings
from nabla_attn.schedule import Schedule

EVERYTHING = "nabla-1"
"""Keeps every block in a sparse call, which observers see."""


@dataclass(frozen=True)
class Calibration:
    """What is measured, and where it is kept.

    Attributes:
        pipeline: A text-to-video pipeline.
        request: The runs; prompt and algorithm are replaced, rules of its schedule stay.
        candidates: Algorithms that layers may use.
        folder: A record for each prompt; those that are there are not measured again.
        num_rows: Query tokens sampled per attention call.

    Raises:
        ValueError: The request's schedule has overrides, which calibration is to find.
    """

    pipeline: Any
    request: GenerationRequest
    candidates: Sequence[SparseConfig]
    folder: Path
    num_rows: int = 16

    def __post_init__(self) -> None:
        rules = self.request.schedule
        if rules is not None and (rules.layer_overrides or rules.step_overrides):
            raise ValueError("the schedule has overrides, which calibration is to find: drop them.")

    @cached_property
    def _identity(self) -> dict[str, str | None]:
        # Once: it reads files of the model, and every record is held against it.
        return model_identity(self.pipeline)

    def measure(
        self,
        prompts: Sequence[str],
        *,
        progress: Callable[[str], ProgressCallback] = lambda label: lambda *stage: None,
    ) -> CandidateLosses:
        """Make a video of each prompt with everything kept, and measure candidates on the way.

        Args:
            prompts: What the videos show.
            progress: From a prompt to what is told about the stages of its run.

        Raises:
            ValueError: A record in the folder was made with other settings.
        """
        records = [self._record(index, text, progress) for index, text in enumerate(prompts)]
        means = (
            np.mean([record.numbers[name] for record in records], axis=0)
            for name in ("density", "error")
        )
        return CandidateLosses(*means)

    def schedule(self, choice: Choice) -> Schedule:
        """The schedule of a choice, with the rules of the request's own."""
        algorithm = Counter(choice.layers).most_common(1)[0][0]
        others = {i: config for i, config in enumerate(choice.layers) if config != algorithm}
        return replace(self._rules(algorithm), layer_overrides=others)

    def _record(
        self, index: int, prompt: str, progress: Callable[[str], ProgressCallback]
    ) -> RunRecord:
        path = self.folder / f"p{index:04d}.json"
        run = replace(
            self.request,
            prompt=prompt,
            sparse_algo=EVERYTHING,
            schedule=self._rules(parse(EVERYTHING)),
        )
        settings = run.to_dict() | self._identity
        settings |= {"candidates": list(map(str, self.candidates)), "num_rows": self.num_rows}
        if path.is_file():
            return check_settings(path, settings)
        probe = CandidateProbe(self.candidates, run.steps, num_rows=self.num_rows)
        _, record = generate(
            self.pipeline, run, on_progress=progress(prompt), on_apply=probe.attach
        )
        numbers = {name: np.round(x, 6).tolist() for name, x in asdict(probe.losses()).items()}
        record = replace(record, kind="calibrate", config=settings, numbers=numbers)
        record.save(path)
        return record

    def _rules(self, algorithm: SparseConfig) -> Schedule:
        if self.request.schedule is None:
            return Schedule(algorithm=algorithm)
        return replace(self.request.schedule, algorithm=algorithm)
