"""Which pairs a rater sees, in which order, and which video stands first."""

import random
from collections.abc import Mapping
from dataclasses import dataclass

from nabla_attn.vote.study import Study


@dataclass(frozen=True)
class Showing:
    """One pair on a rater's way.

    Attributes:
        pair_id: the pair.
        is_swapped: whether the method's video stands first.
        is_repeat: whether the rater has seen the pair before.
    """

    pair_id: str
    is_swapped: bool
    is_repeat: bool = False


def draw_showings(
    study: Study, times_shown: Mapping[str, int], rng: random.Random
) -> list[Showing]:
    """Draw a rater's way: the least shown pairs, all controls, and at the end some repeats.

    Every pair comes once; the repeats come once more with sides swapped, after all others.

    Args:
        study: the study.
        times_shown: how often each pair was given to raters so far.
        rng: draws pairs, order and sides.
    """
    real = [pair.id for pair in study.pairs if not pair.is_control]
    rng.shuffle(real)
    real.sort(key=lambda pair_id: times_shown.get(pair_id, 0))  # stable: ties stay shuffled
    real = real[: study.pairs_per_rater]
    once = real + [pair.id for pair in study.pairs if pair.is_control]
    rng.shuffle(once)
    showings = [Showing(pair_id, rng.random() < 0.5) for pair_id in once]
    # The longest ago first, so that as many others as possible lie between.
    first = [showing for showing in showings if showing.pair_id in set(real)]
    repeats = [
        Showing(showing.pair_id, not showing.is_swapped, is_repeat=True)
        for showing in first[: study.num_repeats]
    ]
    return showings + repeats
