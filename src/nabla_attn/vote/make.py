"""Make a study from a folder of records and videos, as evaluate and compare write them."""

import os
import random
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nabla_attn.config import parse
from nabla_attn.generation.video import write_video
from nabla_attn.media import read_video
from nabla_attn.record import RunRecord
from nabla_attn.vote.study import Pair, Study, database_path, new_token, videos_folder

Videos = dict[tuple[str, int], dict[str, Path]]
"""(prompt, seed) -> algorithm -> video."""

Chosen = list[tuple[str, str, Path, Path]]
"""Prompt, algorithm, the baseline's video, and the algorithm's."""


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
        folder: where the study goes; must hold neither a study nor votes.
        run: folder of records, each with its mp4 of the same name beside it.
        methods: algorithms to compare with the baseline; none means all.
        baseline: the algorithm they are compared with.
        title: what raters read; must not name an algorithm.
        num_controls: trivial pairs: a baseline video against itself, damaged.
        num_repeats: pairs a rater sees twice.
        pairs_per_rater: real pairs per rater.
        seed: chooses which videos become controls.
        notice: shown with every result.

    Raises:
        ValueError: the folder is taken, or the run has no pairs of one of these algorithms.
    """
    folder = Path(folder)
    _check_free(folder)
    base = str(parse(baseline))
    chosen = _choose_pairs(Path(run), base, [str(parse(method)) for method in methods])
    if any(name in title for name in (base, *(method for _, method, _, _ in chosen))):
        raise ValueError(f"the title {title!r} names an algorithm, and raters read it.")
    videos_folder(folder).mkdir(parents=True, exist_ok=True)
    fps = _frames_per_second(chosen[0][2])
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
    """What nobody should prefer: coarse pixels, in every second frame the picture upside down.

    Args:
        frames: uint8 [frames, height, width, 3].
    """
    height, width = frames.shape[1:3]
    side = max(2, min(height, width) // 8)
    rows, columns = (np.arange(size) // side * side for size in (height, width))
    coarse = frames[:, rows][:, :, columns].copy()
    coarse[::2] = coarse[::2, ::-1]
    return coarse


def _check_free(folder: Path) -> None:
    if (folder / "study.json").exists():
        raise ValueError(f"{folder} already holds a study. Choose another folder.")
    if database_path(folder).exists():
        raise ValueError(
            f"{database_path(folder)} holds the votes of another study. Choose another folder, "
            "or move that file away."
        )


def _choose_pairs(run: Path, base: str, names: Sequence[str]) -> Chosen:
    """The pairs of the named algorithms, or of all where none is named."""
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

    with av.open(str(path.absolute())) as container:
        return float(container.streams.video[0].average_rate or 16)
