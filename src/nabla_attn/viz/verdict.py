"""What a run or a study comes to, in one sentence."""

from collections.abc import Mapping
from typing import Any

Metrics = Mapping[str, Any]
"""Metric -> its value, interval and difference to dense, from `evaluation.records`."""


def judge_run(summary: Mapping[str, Metrics]) -> str:
    """Say which algorithm is the best choice, as far as the run can tell.

    Args:
        summary: Metrics of every algorithm, dense among them.

    Returns:
        One sentence. Where all videos were judged, it names the fastest algorithm that shows what
        the prompts say at least as often as dense, else the one that loses least, with the interval
        of the difference. Where they were not, it names those of highest SSIM and speed.
    """
    dense = summary["dense"]
    others = {algo: metrics for algo, metrics in summary.items() if algo != "dense"}
    if not others:
        return "Dense attention was run alone, so there is nothing to compare."
    losses = {algo: metrics.get("judge_all", {}) for algo, metrics in others.items()}
    if all(_is_judged(loss) for loss in losses.values()):
        return _judge_by_prompts(dense, others)
    closest = max(others, key=lambda algo: _ssim(others[algo]))
    fastest = max(others, key=lambda algo: _speed(dense, others[algo]))
    if closest == fastest:
        which = "both closest to dense attention and fastest" if len(others) > 1 else "measured"
        return f"{closest} is {which}: {_cost(dense, others[closest])}."
    return (
        f"Closest to dense attention is {closest}: {_cost(dense, others[closest])}; fastest is "
        f"{fastest}: {_cost(dense, others[fastest])}."
    )


def judge_votes(numbers: Metrics) -> str:
    """Say how the raters of a study voted on the first method, all in all."""
    method, questions = next(iter(numbers["methods"].items()))
    shares = questions["overall"] if "overall" in questions else next(iter(questions.values()))
    parts = {name: shares[name][0] for name in ("method", "baseline") if name in shares}
    if len(parts) < 2:
        return f"No vote on {method} counts yet."
    rest = 1 - sum(parts.values())
    return (
        f"Of {shares['votes']} votes, {parts['method']:.0%} prefer {method}, "
        f"{parts['baseline']:.0%} prefer {numbers['baseline']}, and {rest:.0%} neither."
    )


def _judge_by_prompts(dense: Metrics, others: Mapping[str, Metrics]) -> str:
    def difference(algo: str) -> float:
        return float(others[algo]["judge_all"]["difference"][0])

    even = [algo for algo in others if difference(algo) >= 0]
    if even:
        best = max(even, key=lambda algo: _speed(dense, others[algo]))
        rank = f", the fastest of {len(even)} algorithms that are not behind dense attention,"
    else:
        best = max(others, key=difference)
        rank = ", of all algorithms the least behind dense attention,"
    if len(even or others) == 1:
        rank = ""
    judged = others[best]["judge_all"]
    mean, low, high = judged["difference"]
    return (
        f"{best}{rank} shows what the prompt says in {judged['value']:.1%} of {judged['count']} "
        f"videos against {dense['judge_all']['value']:.1%} for dense (difference {mean:+.1%}, "
        f"95 % interval [{low:+.1%}, {high:+.1%}]): {_cost(dense, others[best])}."
    )


def _is_judged(metric: Metrics) -> bool:
    return None not in metric.get("difference", [None])


def _ssim(metrics: Metrics) -> float:
    return float(metrics["ssim"]["value"])


def _speed(dense: Metrics, metrics: Metrics) -> float:
    seconds = metrics["seconds"]["value"]
    return float(dense["seconds"]["value"] / seconds) if seconds else 1.0


def _cost(dense: Metrics, metrics: Metrics) -> str:
    return (
        f"{_speed(dense, metrics):.2f} times the speed in the transformer, "
        f"{metrics['density']['value']:.1%} of token pairs kept, SSIM {_ssim(metrics):.3f}"
    )
