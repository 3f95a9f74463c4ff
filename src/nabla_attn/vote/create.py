"""Creating a study from the records and videos of `nabla evaluate` or `nabla compare`."""

import os
import random
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nabla_attn.config import parse
from nabla_attn.errors import first_line
from nabla_attn.generation.video import write_video
from nabla_attn.media import read_video
from nabla_attn.record import RunRecord
from nabla_attn.vote.study import Pair, Study, database_path, new_token, videos_folder

NOISE_SHARE = 0.4
"""Share of a damaged picture that noise covers."""

Videos = dict[tuple[str, int], dict[str, Path]]
"""(prompt, seed) -> algorithm -> video."""

Chosen = list[tuple[str, str, Path, Path]]
"""Prompt, algorithm, the baseline's video, and the algorithm's video."""


def make_study(
    folder: str | Path,
    run: str | Path,
    *,
    methods: Sequence[str] = (),
    baseline: str = "dense",
    title: str = "Which video is better?",
    num_controls: int = 1,
    num_repeats: int = 2,
    pairs_per_rater: int = 20,
    seed: int = 0,
    notice: str = "",
) -> Study:
    """Copy the videos of a run under meaningless names and write the study.

    Args:
        folder: The folder for the study, without a study or votes.
        run: The folder of records, each with an mp4 of the same name beside it.
        methods: Algorithms to compare with the baseline; none means all.
        baseline: The algorithm they are compared with.
        title: Heading that raters read; it must not name an algorithm.
        num_controls: Number of pairs of a baseline video and a damaged copy of it.
        num_repeats: Number of pairs that a rater judges twice.
        pairs_per_rater: Number of real pairs that one rater judges.
        seed: Seed of the choice of videos for controls.
        notice: Text shown with every result.

    Raises:
        ValueError: The folder is taken, the run has no pairs of one of these algorithms, or a video
            cannot be read.
    """
    folder = Path(folder)
    _check_free(folder)
    base = str(parse(baseline))
    chosen = _choose_pairs(Path(run), base, [str(parse(method)) for method in methods])
    if any(name in title for name in (base, *(method for _, method, _, _ in chosen))):
        raise ValueError(f"the title {title!r} names an algorithm, and raters read it.")
    rates = [_frames_per_second(video) for *_, theirs, ours in chosen for video in (theirs, ours)]
    videos_folder(folder).mkdir(parents=True, exist_ok=True)
    fps = rates[0]
    pairs = [
        Pair(new_token(), prompt, method, _take(folder, theirs), _take(folder, ours))
        for prompt, method, theirs, ours in chosen
    ]
    pairs += _make_controls(folder, chosen, num_controls, fps, seed)
    study = Study(
        title=title,
        baseline=base,
        pairs=tuple(pairs),
        fps=fps,
        pairs_per_rater=min(pairs_per_rater, len(chosen)),
        num_repeats=num_repeats,
        notice=notice,
        link_token=new_token(),
        admin_token=new_token(),
    )
    study.save(folder)
    return study


def damage(frames: np.ndarray) -> np.ndarray:
    """Return a video that looks broken to any rater: wrong colours, noise, and a frozen half.

    Args:
        frames: uint8 [frames, height, width, 3].
    """
    count, height, width, _ = frames.shape
    broken = 255 - frames[..., [2, 0, 1]]
    broken[:, :, : width // 2] = broken[:1, :, : width // 2]
    rng = np.random.default_rng(0)
    # Grains of several pixels, because a codec smooths finer noise away.
    grain = max(2, min(height, width) // 48)
    shape = (count, -(-height // grain), -(-width // grain))
    colours = rng.integers(256, size=(*shape, 3), dtype=np.uint8)
    is_noise = rng.random(shape) < NOISE_SHARE
    for values in (1, 2):
        colours = colours.repeat(grain, axis=values)
        is_noise = is_noise.repeat(grain, axis=values)
    is_noise = is_noise[:, :height, :width, None]
    return np.where(is_noise, colours[:, :height, :width], broken)


def _check_free(folder: Path) -> None:
    if (folder / "study.json").exists():
        raise ValueError(f"{folder} already holds a study. Choose another folder.")
    if database_path(folder).exists():
        raise ValueError(
            f"{database_path(folder)} holds the votes of another study. Choose another folder, "
            "or move that file away."
        )


def _choose_pairs(run: Path, base: str, names: Sequence[str]) -> Chosen:
    """Return the pairs of the named algorithms, or of all where none is named."""
    found = _find_videos(run)
    known = sorted({algo for group in found.values() for algo in group})
    wanted = names or [algo for algo in known if algo != base]
    chosen = [
        (prompt, method, group[base], group[method])
        for (prompt, _), group in found.items()
        for method in wanted
        if base in group and method in group
    ]
    missing = [name for name in names if all(name != method for _, method, _, _ in chosen)]
    if missing or not chosen:
        raise ValueError(
            f"{run} has no pairs of {base} with {', '.join(missing) or 'another algorithm'}: it "
            f"has videos of {', '.join(known) or 'none'}. Choose from these, or make "
            "the others with `nabla evaluate`."
        )
    return chosen


def _find_videos(run: Path) -> Videos:
    if not run.is_dir():
        raise ValueError(f"run folder not found: {run}. Pass what `nabla evaluate` wrote.")
    found: Videos = defaultdict(dict)
    for path in sorted(run.rglob("*.json")):
        video = path.with_suffix(".mp4")
        if not video.is_file():
            continue
        record = RunRecord.load(path)
        algo = str(record.config.get("sparse_algo", ""))
        found[str(record.config.get("prompt", "")), record.seed][algo] = video
    return dict(found)


def _make_controls(folder: Path, chosen: Chosen, count: int, fps: float, seed: int) -> list[Pair]:
    originals = list(dict.fromkeys((prompt, theirs) for prompt, _, theirs, _ in chosen))
    picked = random.Random(seed).sample(originals, min(count, len(originals)))
    pairs = []
    for prompt, source in picked:
        name = f"{new_token()}.mp4"
        write_video(damage(read_video(source)), videos_folder(folder) / name, fps)
        _forget_time(videos_folder(folder) / name)
        pairs.append(Pair(new_token(), prompt, "control", _take(folder, source), name, True))
    return pairs


def _take(folder: Path, source: Path) -> str:
    name = f"{new_token()}.mp4"
    shutil.copyfile(source, videos_folder(folder) / name)
    _forget_time(videos_folder(folder) / name)
    return name


def _forget_time(path: Path) -> None:
    """Dense videos are made first, and HTTP tells a file's time to the rater's browser."""
    os.utime(path, (0, 0))


def _frames_per_second(path: Path) -> float:
    import av

    try:
        with av.open(str(path.absolute())) as container:
            return float(container.streams.video[0].average_rate or 16)
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"cannot read the video {path}: {first_line(error)}.") from error
