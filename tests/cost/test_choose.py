"""The exact choice within a budget, against trying everything."""

import itertools
import os
import sys

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import optimize

from nabla_attn.cost.choose import SLACK, choose


def by_trying(loss, seconds, budget):
    units, options = loss.shape
    best = np.inf
    for picked in itertools.product(range(options), repeat=units):
        rows = np.arange(units), np.array(picked)
        if seconds[rows].sum() <= budget:
            best = min(best, loss[rows].sum())
    return best


@given(
    st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 4), st.floats(0, 1), st.booleans()
)
@example(1, 2, 2, 0.9999999999999999, False)
def test_no_choice_loses_less(seed, units, options, share, is_whole):
    rng = np.random.default_rng(seed)
    loss, seconds = rng.normal(size=(2, units, options)) * 10.0 ** rng.integers(-6, 6)
    seconds = np.abs(seconds)
    if is_whole:
        loss, seconds = rng.integers(-3, 4, (units, options)), rng.integers(0, 4, (units, options))
    least, most = seconds.min(axis=1).sum(), seconds.max(axis=1).sum()
    budget = float(least + share * (most - least))
    picked = choose(loss, seconds, budget)
    rows = np.arange(units), picked
    assert seconds[rows].sum() <= budget * (1 + SLACK)
    # What exceeds the budget by rounding may be taken, and need not be.
    most_loss, least_loss = (by_trying(loss, seconds, b) for b in (budget, budget * (1 + SLACK)))
    near = {"rel": 1e-6, "abs": 1e-12}
    found = loss[rows].sum()
    assert found <= most_loss or found == pytest.approx(most_loss, **near)
    assert found >= least_loss or found == pytest.approx(least_loss, **near)


def test_greedy_would_be_wrong():
    # The best gain per second first leaves no room for the option that gains most.
    loss, seconds = [[0, -6, -10], [0, -5, -5]], [[0, 5, 10], [0, 6, 6]]
    assert choose(loss, seconds, 10).tolist() == [2, 0]


def test_infinite_options_are_never_taken():
    assert choose([[np.inf, 1.0], [0.0, np.inf]], [[0, 1], [1, 0]], 2).tolist() == [1, 0]
    with pytest.raises(ValueError, match="unit 1 has no option"):
        choose([[0.0, 1.0], [np.inf, np.inf]], [[0, 1], [1, 0]], 2)


@pytest.mark.parametrize(
    ("loss", "seconds", "budget", "words"),
    [
        ([[0.0]], [[2.0]], 1.0, "at least 2"),
        ([[0.0]], [[2.0]], float("nan"), "at least 2"),
        ([[float("nan")]], [[2.0]], 3.0, "numbers"),
        ([[0.0]], [[-2.0]], 3.0, "not negative"),
        ([0.0], [1.0], 3.0, r"\[units, options\]"),
        ([[0.0]], [[1.0, 2.0]], 3.0, "one shape"),
    ],
)
def test_what_cannot_be_is_said(loss, seconds, budget, words):
    with pytest.raises(ValueError, match=words):
        choose(loss, seconds, budget)


def test_many_units_fit_into_memory():
    # A model of 40 layers and 40 heads in 3 ranges; as one dense matrix it would be 0.6 GB.
    rng = np.random.default_rng(0)
    spent = np.sort(rng.random((4800, 3)), axis=1)
    loss = np.sort(rng.random((4800, 3)), axis=1)[:, ::-1]
    picked = choose(loss, spent, 0.5 * spent.mean(axis=1).sum())
    assert spent[np.arange(4800), picked].sum() <= 0.5 * spent.mean(axis=1).sum() * (1 + 1e-9)


def test_what_the_solver_prints_stays_out_of_results(capfd, monkeypatch):
    original = optimize.milp

    def milp(*args, **options):
        os.write(1, b"HighsMipSolverData")
        return original(*args, **options)

    monkeypatch.setattr(optimize, "milp", milp)
    sys.stdout.write("before ")
    assert choose([[1, 0]], [[0, 1]], 1.0).tolist() == [1]
    sys.stdout.write("after")
    assert capfd.readouterr().out == "before after"
