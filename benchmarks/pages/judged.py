"""Which measure of a layer foretells the judged video: rank correlations over methods."""

from collections.abc import Sequence
from math import log10
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from benchmarks.pages.board import method_of, nearest
from benchmarks.pages.paired import interval
from nabla_attn.bench.report import table
from nabla_attn.record import RunRecord

MEASURES = {
    "density": ("pairs kept", 1),
    "recall": ("exact mass", 1),
    "recall_worst_head": ("exact mass, worst head", 1),
    "recall_early": ("exact mass, early steps", 1),
    "recall_late": ("exact mass, late steps", 1),
    "error": ("relative error", -1),
    "error_worst_head": ("relative error, worst head", -1),
    "error_early": ("relative error, early steps", -1),
    "error_late": ("relative error, late steps", -1),
    "distance": ("distance", -1),
    "distance_worst_head": ("distance, worst head", -1),
}
"""Measure of the leaderboard -> its name here, and whether more (1) or less (-1) is better."""

VERDICTS = {
    "psnr": ("PSNR to dense", -1),
    "ssim": ("SSIM to dense", 1),
    "judge_all": ("all right", 1),
    "judge_outline": ("outline", 1),
}
"""Metric of a judged video -> the same; of PSNR the records hold the squared error."""

NUM_RESAMPLES = 1000
LEAST_POINTS = 3
"""Algorithms about one density from which on their ranks count."""

Values = NDArray[np.float64]


def build_judged(judged: RunRecord, board: Sequence[RunRecord]) -> list[str]:
    """Return the paragraphs: what the videos are like, and what foretells them.

    Args:
        judged: The record of `nabla bench judged`.
        board: Those of the leaderboard on the same model.
    """
    videos = judged.numbers["algorithms"]
    prompts = list(videos["dense"])
    lines = [
        f"{len(prompts)} held-out prompts, {judged.config['frames']} frames, "
        f"{judged.config['steps']} steps; dense and sparse videos of one noise. "
        f"Device: {judged.device}.",
        "\n".join(table(*_videos(videos))),
        "\n".join(table(*_leaders(videos))),
        "*Ahead by* is the mean difference to the second over the same prompts and noises, with "
        "its 95 % interval.",
    ]
    known = [a for a in videos if all(a in each.numbers["algorithms"] for each in board)]
    points = [a for a in known if a != "dense"]
    if not board or len(points) < LEAST_POINTS:
        return [*lines, f"{len(points)} of them are on the leaderboard, too few to rank."]
    groups = [nearest(_mean(board, a, "density")) for a in points]
    correlations = {
        scope: rank_correlations(judged, board, points, groups if scope == "within" else None)
        for scope in ("all", "within")
    }
    methods = {method_of(a) for a in points}
    lines.append(
        f"Spearman's rank correlation of each measure with each verdict, over {len(points)} "
        f"settings of {len(methods)} methods: over all of them, and the mean of those among "
        "settings about one density, where keeping more pairs no longer helps. 1 is a measure that "
        "ranks as the videos do. 95 % intervals resample the prompts of the leaderboard and those "
        "of the videos."
    )
    for scope, title in (("all", "Over all settings"), ("within", "About one density")):
        lines += [f"#### {title}", _table(correlations[scope])]
        lines += ["\n".join(_words(correlations[scope]))]
    return lines


def _mean(board: Sequence[RunRecord], algorithm: str, name: str) -> float:
    return float(np.mean([each.numbers["algorithms"][algorithm][name] for each in board]))


def _videos(videos: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of means, sparsest last."""
    head = ["algorithm", "pairs kept", *(name for name, _ in VERDICTS.values())]
    rows = []
    for algorithm, mine in sorted(videos.items(), key=lambda each: -_of(each[1], "density")):
        psnr = _of(mine, "psnr")
        cells = ["-" if psnr == 0 else f"{-10 * log10(psnr):.1f}", f"{_of(mine, 'ssim'):.4f}"]
        cells += [f"{_of(mine, 'judge_all'):.0%}", f"{_of(mine, 'judge_outline'):.3f}"]
        rows.append([f"`{algorithm}`", f"{_of(mine, 'density'):.1%}", *cells])
    return head, rows


def _leaders(videos: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of the best two about each density, paired by prompt."""
    groups: dict[float, list[str]] = {}
    for algorithm, mine in videos.items():
        if (density := nearest(_of(mine, "density"))) is not None:
            groups.setdefault(density, []).append(algorithm)
    rows = []
    for density, mine in sorted(groups.items()):
        for metric in ("ssim", "judge_outline") if len(mine) > 1 else ():
            values = {a: [float(each[metric]) for each in videos[a].values()] for a in mine}
            best, second = sorted(values, key=lambda a: -fmean(values[a]))[:2]
            apart = [a - b for a, b in zip(values[best], values[second], strict=True)]
            ends = interval(apart)
            ahead = f"{fmean(apart):.3f}" + (
                "" if ends is None else f" ({ends[0]:+.3f} to {ends[1]:+.3f})"
            )
            name = VERDICTS[metric][0]
            rows.append([f"{density:.0%}", name, f"`{best}`", f"`{second}`", ahead])
    return ["about", "by", "best", "second", "ahead by"], rows


def _of(mine: dict[str, Any], name: str) -> float:
    return float(np.mean([each[name] for each in mine.values()]))


def rank_correlations(
    judged: RunRecord,
    board: Sequence[RunRecord],
    points: Sequence[str],
    groups: Sequence[float | None] | None,
) -> dict[tuple[str, str], Values]:
    """Return Spearman's correlation of every measure and verdict: first as found, then resampled.

    Args:
        judged: The record of videos.
        board: The records of the leaderboard.
        points: Algorithms that are in both.
        groups: The density that each is about: correlations are then means over densities; None
            takes all algorithms together.
    """
    rng = np.random.default_rng(0)
    videos = judged.numbers["algorithms"]
    prompts = list(videos["dense"])
    ours, theirs = (_draws(rng, len(each)) for each in (board, prompts))
    measures = {
        name: sign * _means([[_number(each, a, name) for each in board] for a in points], ours)
        for name, (_, sign) in MEASURES.items()
        if all(name in each.numbers["algorithms"][a] for each in board for a in points)
    }
    mine = [videos[algorithm] for algorithm in points]
    verdicts = {
        name: sign * _means([[each[prompt][name] for prompt in prompts] for each in mine], theirs)
        for name, (_, sign) in VERDICTS.items()
    }
    parts = _parts(points, groups)
    return {
        (measure, verdict): _mean_of_known([_spearman(x[:, p], y[:, p]) for p in parts])
        for measure, x in measures.items()
        for verdict, y in verdicts.items()
        if parts and not all(np.isnan(_spearman(x[:1, p], y[:1, p])[0]) for p in parts)
    }


def _mean_of_known(rows: list[Values]) -> Values:
    """The mean of the rows where they are numbers; NaN where none of them is."""
    values = np.array(rows)
    counts = (~np.isnan(values)).sum(axis=0)
    return np.where(counts > 0, np.nansum(values, axis=0) / np.maximum(counts, 1), np.nan)


def _number(record: RunRecord, algorithm: str, name: str) -> float:
    return float(record.numbers["algorithms"][algorithm][name])


def _draws(rng: np.random.Generator, count: int) -> NDArray[np.int64]:
    """All prompts once, then as many with replacement, again and again."""
    drawn = rng.integers(count, size=(NUM_RESAMPLES, count))
    return np.concatenate([np.arange(count)[None], drawn])


def _means(values: list[list[float]], draws: NDArray[np.int64]) -> Values:
    """[draws, points]: the mean of each point over each draw of prompts."""
    return np.asarray(values, dtype=float)[:, draws].mean(axis=2).T


def _parts(points: Sequence[str], groups: Sequence[float | None] | None) -> list[list[int]]:
    if groups is None:
        return [list(range(len(points)))]
    parts = [[i for i, each in enumerate(groups) if each == group] for group in set(groups)]
    kept = [part for part in parts if len(part) >= LEAST_POINTS and groups[part[0]] is not None]
    return sorted(kept)


def _spearman(x: Values, y: Values) -> Values:
    """Row by row; NaN where one of them has no ranks."""
    ranks = [rankdata(each, axis=1) for each in (x, y)]
    a, b = (each - each.mean(axis=1, keepdims=True) for each in ranks)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((a * b).sum(axis=1) / np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1)))


def _ends(values: Values) -> tuple[float, float]:
    low, high = np.nanquantile(values[1:], (0.025, 0.975))
    return float(low), float(high)


def _table(found: dict[tuple[str, str], Values]) -> str:
    measures = list(dict.fromkeys(measure for measure, _ in found))
    verdicts = list(dict.fromkeys(verdict for _, verdict in found))
    rows = []
    for measure in measures:
        cells = []
        for verdict in verdicts:
            values = found.get((measure, verdict))
            ends = (0.0, 0.0) if values is None else _ends(values)
            cells.append(
                "-" if values is None else f"{values[0]:.2f} ({ends[0]:.2f} to {ends[1]:.2f})"
            )
        rows.append([MEASURES[measure][0], *cells])
    return "\n".join(table(["measure", *(VERDICTS[verdict][0] for verdict in verdicts)], rows))


def _words(found: dict[tuple[str, str], Values]) -> list[str]:
    """Return a line for each verdict: what foretells it best, and exact mass against error."""
    lines = []
    for verdict in dict.fromkeys(verdict for _, verdict in found):
        mine = {measure: values for (measure, v), values in found.items() if v == verdict}
        best = max(mine, key=lambda measure: float(mine[measure][0]))
        equal = [MEASURES[m][0] for m in mine if m != best and _ends(mine[best] - mine[m])[0] <= 0]
        text = f"- {VERDICTS[verdict][0]}: {MEASURES[best][0]} ranks most alike"
        text += f" ({mine[best][0]:.2f}); not told apart: {', '.join(equal) or 'none'}."
        if "recall" in mine and "error" in mine:
            text += f" {_mass_or_error(mine['recall'] - mine['error'])}"
        lines.append(text)
    return lines


def _mass_or_error(lead: Values) -> str:
    low, high = _ends(lead)
    ends = f"(difference {lead[0]:+.2f}, {low:+.2f} to {high:+.2f})"
    if low > 0:
        return f"Exact mass ranks better than relative error {ends}."
    if high < 0:
        return f"Relative error ranks better than exact mass {ends}."
    return f"Exact mass and relative error are not told apart {ends}."
