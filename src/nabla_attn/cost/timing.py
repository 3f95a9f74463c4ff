"""Seconds of small work: contenders in turn, in warm loops, by the clock of this process."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class LoopTiming:
    """Seconds of one call of a contender, a figure for each round."""

    seconds: tuple[float, ...]

    @property
    def least(self) -> float:
        """The quickest round: other programs only ever slow a round down."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """Middle of the rounds."""
        return statistics.median(self.seconds)


def time_loops(
    runs: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 8,
    max_rounds: int = 40,
    agreement: float = 0.03,
    loop_seconds: float = 0.004,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, LoopTiming]:
    """Time each contender in every round, in loops long enough for the clock.

    CPU time leaves out waiting for other programs, but not their pressure on caches; use
    `time.perf_counter` where work runs on another device or on several threads.

    Args:
        runs: Name to what is timed; results are dropped.
        rounds: Least number of rounds, after one that warms up.
        max_rounds: Most rounds.
        agreement: Rounds go on until the two quickest of each contender differ by no more than this
            share, so that a burst of other programs' work does not pass for the time.
        loop_seconds: Least seconds of a loop.
        clock: The clock.
    """
    repeats = {}
    for name, run in runs.items():
        run()
        start = clock()
        run()
        repeats[name] = max(1, round(loop_seconds / max(clock() - start, 1e-6)))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(max_rounds):
        if number >= rounds and all(_agree(values, agreement) for values in seconds.values()):
            break
        for name, run in runs.items():
            start = clock()
            for _ in range(repeats[name]):
                run()
            seconds[name].append((clock() - start) / repeats[name])
    return {name: LoopTiming(tuple(values)) for name, values in seconds.items()}


def _agree(seconds: list[float], agreement: float) -> bool:
    first, second = sorted(seconds)[:2]
    return second <= first * (1 + agreement)
