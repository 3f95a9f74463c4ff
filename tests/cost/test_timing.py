"""Timing of small work, by a clock that is made up."""

import itertools

from nabla_attn.cost.timing import time_loops


class Machine:
    """Runs take given seconds on a clock of its own."""

    def __init__(self):
        self.now = 0.0

    def run(self, seconds):
        def step():
            self.now += next(seconds)

        return step


def test_short_runs_are_timed_in_loops():
    machine = Machine()
    runs = {
        "short": machine.run(itertools.repeat(1e-4)),
        "long": machine.run(itertools.repeat(1.0)),
    }
    times = time_loops(runs, rounds=3, clock=lambda: machine.now)
    assert abs(times["short"].least - 1e-4) < 1e-9 and abs(times["long"].median - 1) < 1e-9
    assert len(times["short"].seconds) == 3


def test_rounds_go_on_until_two_agree():
    machine = Machine()
    burst = itertools.chain([1.0] * 2, (1 + 0.5 * (9 - n) for n in range(9)), itertools.repeat(1.0))
    times = time_loops({"a": machine.run(burst)}, rounds=4, clock=lambda: machine.now)
    assert len(times["a"].seconds) == 11 and times["a"].least == 1.0


def test_what_never_agrees_ends():
    machine = Machine()
    falling = (2.0**-n for n in range(1000))
    times = time_loops(
        {"a": machine.run(falling)}, max_rounds=9, clock=lambda: machine.now, loop_seconds=1e-12
    )
    assert len(times["a"].seconds) == 9
