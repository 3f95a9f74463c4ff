"""Videos of methods at the leaderboard's settings, judged beside dense ones of the same noise."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nabla_attn.config import parse
from nabla_attn.evaluation.knobs import row_of
from nabla_attn.evaluation.prompts import make_items
from nabla_attn.evaluation.records import METRICS, Records, read_records
from nabla_attn.evaluation.run import Evaluation, Measures, VideoCallback
from nabla_attn.generation.request import GenerationRequest
from nabla_attn.generation.video import Scorer
from nabla_attn.progress import ignore_progress
from nabla_attn.record import RunRecord, collect_versions
from nabla_attn.schedule import Schedule

KEPT = ("psnr", "ssim", "motion_ssim", "judge_all", "judge_outline", "density", "seconds")
"""Metrics of `evaluation.records` that are kept of every video; PSNR as squared error."""


def read_algorithms(
    settings: Path, names: Sequence[str], densities: Sequence[float]
) -> dict[str, list[str]]:
    """What the leaderboard set methods to: method -> algorithms, the sparsest first.

    Args:
        settings: The leaderboard's record of its knobs.
        names: Methods.
        densities: Densities asked for there.

    Raises:
        ValueError: The record is missing or lacks one of them, or a method needs a table.
    """
    if not settings.is_file():
        raise ValueError(f"there is no {settings}: run `nabla bench methods` first.")
    known = RunRecord.load(settings).numbers["settings"]
    found: dict[str, list[str]] = {}
    for name in names:
        if "table" in row_of(name).needs:
            raise ValueError(f"{name} needs a table for each setting: judge it with a schedule.")
        mine = [
            each["algorithm"]
            for wanted in densities
            for each in known.get(name, ())
            if each["wanted"] in (None, wanted)
        ]
        if len(mine) < len(densities):
            raise ValueError(
                f"{settings} lacks {name} at some of the densities {list(densities)}: run "
                f"`nabla bench methods --method {name}` with them first."
            )
        found[name] = list(dict.fromkeys(mine))
    return found


def judge_methods(
    pipeline: Any,
    request: GenerationRequest,
    algorithms: Sequence[str],
    prompts: Sequence[str],
    scorer: Scorer,
    *,
    videos: Path,
    record: Path,
    fps: float,
    on_video: VideoCallback = lambda label, done, total: ignore_progress,
    on_failed: Callable[[str, str], None] = lambda item, reason: None,
) -> RunRecord:
    """Make and judge what is missing, and record what is kept of every video.

    Args:
        pipeline: A text-to-video pipeline.
        request: Size, steps and guidance; the rest is replaced.
        algorithms: The algorithms; dense is added.
        prompts: What the videos show, each once.
        scorer: The judge.
        videos: The folder of the videos and their records, as of `nabla evaluate`.
        record: Where the record is written, of the prompts that all algorithms have.
        fps: Frames per second of the videos.
        on_video: Called before every video.
        on_failed: Called with a prompt that failed, and the reason.
    """
    # As on the leaderboard, in every step: a window alone would begin with twelve dense ones.
    everywhere = Schedule(algorithm=parse(algorithms[0]))
    request = replace(request, sparse_algo=algorithms[0], schedule=everywhere)
    evaluation = Evaluation(
        pipeline, request, videos, fps=fps, measures=Measures(scorer=scorer, num_probed=0)
    )
    shared = evaluation.run(algorithms, make_items(prompts, [request.seed]), on_video=on_video)
    for item, reason in shared.failed.items():
        on_failed(item, reason)
    found = summarise(read_records(videos))
    found.save(record)
    return found


def summarise(records: Records) -> RunRecord:
    """The record of a judged run: algorithm -> prompt -> metric -> value."""
    first = next(iter(records["dense"].values()))
    own = ("prompt", "sparse_algo", "prompt_index", "schedule")
    config = {key: value for key, value in first.config.items() if key not in own}
    numbers = {
        algorithm: {
            record.config["prompt"]: {name: METRICS[name](record) for name in KEPT}
            for record in mine.values()
        }
        for algorithm, mine in records.items()
    }
    versions = collect_versions()
    return RunRecord("judged", config, first.seed, versions, first.device, {"algorithms": numbers})
