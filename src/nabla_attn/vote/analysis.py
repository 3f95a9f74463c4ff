"""From votes to numbers: shares with intervals, agreement, consistency, excluded raters."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nabla_attn.vote.study import QUESTIONS, Study

PREFERENCES = ("baseline", "method", "both_good", "both_bad")
"""An answer with its sides undone: which video is better, or a tie."""

NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Exclusion:
    """The rule for raters who do not count, to be set before looking at results.

    Attributes:
        min_votes: Number of pairs that a rater must have judged.
        min_controls: Share of the control pairs that a rater must get right. Right is to call the
            undamaged video better, or both bad.
    """

    min_votes: int = 1
    min_controls: float = 0.5

    def __str__(self) -> str:
        pairs = f"{self.min_votes} pair{'' if self.min_votes == 1 else 's'}"
        return (
            f"A rater counts after judging at least {pairs}, with at least "
            f"{self.min_controls:.0%} of the control pairs right."
        )


@dataclass(frozen=True)
class Judgement:
    """One vote with its sides undone.

    Attributes:
        rater: Number of the rater.
        position: Place of the pair among the rater's pairs.
        pair_id: The pair.
        method: The algorithm, or "control".
        is_control: Whether the right answer is known.
        is_repeat: Whether the rater had judged the pair before.
        method_first: Whether the method's video stood first.
        preferences: One of `PREFERENCES` for each question.
        seconds: Time from seeing the pair to voting.
        created: UTC time of the vote.
    """

    rater: int
    position: int
    pair_id: str
    method: str
    is_control: bool
    is_repeat: bool
    method_first: bool
    preferences: dict[str, str]
    seconds: float
    created: str


def read_judgements(study: Study, rows: Sequence[Any]) -> list[Judgement]:
    """Return the rows of `VoteStore.all_votes` with sides undone."""
    pairs = {pair.id: pair for pair in study.pairs}
    judgements = []
    for row in rows:
        pair = pairs[row.pair_id]
        sides = {
            "first": "method" if row.is_swapped else "baseline",
            "second": "baseline" if row.is_swapped else "method",
        }
        judgements.append(
            Judgement(
                rater=row.rater_id,
                position=row.position,
                pair_id=pair.id,
                method=pair.method,
                is_control=pair.is_control,
                is_repeat=row.is_repeat,
                method_first=row.is_swapped,
                preferences={
                    question: sides.get(getattr(row, question), getattr(row, question))
                    for question in QUESTIONS
                },
                seconds=row.seconds,
                created=row.created,
            )
        )
    return judgements


def count_votes(study: Study, rows: Sequence[Any], rule: Exclusion | None = None) -> dict[str, Any]:
    """Return all results as plain values.

    Shares are over votes. Their 95 % intervals come from resampling raters, not votes, because the
    votes of one rater resemble each other. Repeats count for consistency only.

    Args:
        study: The study.
        rows: Rows of `VoteStore.all_votes` or `read_votes`.
        rule: The rule for raters who do not count.
    """
    rule = rule or Exclusion()
    judgements = read_judgements(study, rows)
    excluded = _excluded_raters(judgements, rule)
    kept = [item for item in judgements if item.rater not in excluded]
    counted = [item for item in kept if not item.is_control and not item.is_repeat]
    return {
        "notice": study.notice,
        "baseline": study.baseline,
        "rule": str(rule),
        "raters": len({item.rater for item in judgements}),
        "raters_counted": len({item.rater for item in counted}),
        "excluded": {str(rater): reason for rater, reason in sorted(excluded.items())},
        "votes_counted": len(counted),
        "methods": {
            method: {
                question: _measure_shares(
                    [item for item in counted if item.method == method], question
                )
                for question in QUESTIONS
            }
            for method in study.methods
        },
        "agreement": {question: measure_agreement(counted, question) for question in QUESTIONS},
        "controls": _count_controls(judgements),
        "repeats": _count_repeats(kept),
    }


def measure_agreement(judgements: Sequence[Judgement], question: str) -> float | None:
    """Return Krippendorff's alpha for nominal answers: 1 is perfect agreement, 0 is chance.

    Source: Krippendorff, Content Analysis (2004), chapter 11: 1 - observed / expected disagreement.

    Returns:
        The coefficient, or None where no pair has two raters or all answers are the same.
    """
    by_pair: dict[str, Counter[str]] = defaultdict(Counter)
    for item in judgements:
        by_pair[item.pair_id][item.preferences[question]] += 1
    units = [unit for unit in by_pair.values() if unit.total() > 1]
    total: Counter[str] = sum(units, Counter())
    count = total.total()
    expected = sum(number * (count - number) for number in total.values())
    if not expected:
        return None
    observed = sum(
        sum(number * (unit.total() - number) for number in unit.values()) / (unit.total() - 1)
        for unit in units
    )
    return round(1 - observed * (count - 1) / expected, 4)


def _measure_shares(judgements: Sequence[Judgement], question: str) -> dict[str, Any]:
    """Return each preference's share, and method minus baseline, as [value, low, high]."""
    raters = {rater: row for row, rater in enumerate(sorted({item.rater for item in judgements}))}
    counts = np.zeros((len(raters), len(PREFERENCES)))
    for item in judgements:
        counts[raters[item.rater], PREFERENCES.index(item.preferences[question])] += 1
    if not raters:
        return {"votes": 0}
    rng = np.random.default_rng(0)
    picks = rng.integers(len(raters), size=(NUM_RESAMPLES, len(raters)))
    drawn = counts[picks].sum(axis=1)
    drawn /= drawn.sum(axis=1, keepdims=True)
    shares = counts.sum(axis=0) / counts.sum()
    columns = dict(zip(PREFERENCES, zip(shares, drawn.T, strict=True), strict=True))
    columns["difference"] = (shares[1] - shares[0], drawn[:, 1] - drawn[:, 0])
    is_spread = len(raters) > 1
    return {"votes": int(counts.sum())} | {
        name: [round(float(value), 4), *(_interval(sample) if is_spread else (None, None))]
        for name, (value, sample) in columns.items()
    }


def _of_method(judgements: Sequence[Judgement], method: str) -> list[Judgement]:
    return [item for item in judgements if item.method == method]


def _interval(sample: np.ndarray) -> list[float]:
    return [round(float(bound), 4) for bound in np.percentile(sample, [2.5, 97.5])]


def _is_right(item: Judgement) -> bool:
    return item.preferences["overall"] in ("baseline", "both_bad")


def _excluded_raters(judgements: Sequence[Judgement], rule: Exclusion) -> dict[int, str]:
    excluded = {}
    by_rater: dict[int, list[Judgement]] = defaultdict(list)
    for item in judgements:
        by_rater[item.rater].append(item)
    for rater, mine in by_rater.items():
        controls = [_is_right(item) for item in mine if item.is_control]
        if len(mine) < rule.min_votes:
            excluded[rater] = f"judged {len(mine)} pairs"
        elif controls and np.mean(controls) < rule.min_controls:
            excluded[rater] = f"right on {sum(controls)} of {len(controls)} control pairs"
    return excluded


def _count_controls(judgements: Sequence[Judgement]) -> dict[str, int]:
    right = [_is_right(item) for item in judgements if item.is_control]
    return {"right": sum(right), "of": len(right)}


def _count_repeats(judgements: Sequence[Judgement]) -> dict[str, int]:
    """Count how often a rater answered alike overall when a pair came again, sides swapped."""
    first = {
        (item.rater, item.pair_id): item.preferences["overall"]
        for item in judgements
        if not item.is_repeat
    }
    again = [item for item in judgements if item.is_repeat and (item.rater, item.pair_id) in first]
    same = [item.preferences["overall"] == first[item.rater, item.pair_id] for item in again]
    return {"same": sum(same), "of": len(same)}
