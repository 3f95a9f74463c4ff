"""The one solver: an option for each unit, the least loss within a budget, exactly."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

SLACK = 1e-9
"""Share of the budget that rounding of a sum may exceed it by."""


def choose(loss: "ArrayLike", seconds: "ArrayLike", budget: float) -> "NDArray[np.intp]":
    """Choose an option for each unit so that the sum of losses is least within the budget.

    Units are stages of a network and options its numbers of blocks, or units are layers and options
    algorithms; the mechanism is the same. It is a multiple-choice knapsack, solved as an integer
    program to proven optimality.

    Args:
        loss: Losses [units, options]. Infinite where a unit has no such option.
        seconds: What each option spends, [units, options], not negative.
        budget: What all units may spend together, in the unit of `seconds`.

    Returns:
        Index of the option of each unit, [units].

    Raises:
        ValueError: The shapes differ, a value is not a number, or the least that all units can
            spend is more than the budget; the least is named.
    """
    costs, spent = np.asarray(loss, float), np.asarray(seconds, float)
    if costs.ndim != 2 or costs.shape != spent.shape or not costs.size:
        raise ValueError(
            f"loss and seconds must be two tables [units, options] of one shape: got "
            f"{costs.shape} and {spent.shape}."
        )
    if np.isnan(costs).any() or np.isnan(spent).any() or (spent < 0).any():
        raise ValueError("loss and seconds must be numbers, and seconds not negative.")
    is_option = np.isfinite(costs) & np.isfinite(spent)
    if not is_option.any(axis=1).all():
        unit = int(np.flatnonzero(~is_option.any(axis=1))[0])
        raise ValueError(f"unit {unit} has no option with a finite loss and finite seconds.")
    cheapest = np.where(is_option, spent, np.inf).min(axis=1)
    least = cheapest.sum()
    if not budget >= least * (1 - SLACK):
        raise ValueError(
            f"a budget of {budget:.6g} is too small: these options spend at least {least:.6g}."
        )
    budget = max(float(budget), float(least))
    # What fits beside no other unit's cheapest option is no option.
    is_option &= spent - cheapest[:, None] <= (budget - least) + SLACK * budget
    return _solve(costs, spent, is_option, budget)


def _solve(
    costs: np.ndarray, spent: np.ndarray, is_option: np.ndarray, budget: float
) -> "NDArray[np.intp]":
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import eye, kron

    units, options = costs.shape
    is_option = is_option & ~_is_dominated(costs, spent)
    costs = np.where(is_option, costs, 0.0)
    spent = np.where(is_option, spent, 0.0)
    # Scaled so that the solver's absolute tolerances (1e-6) are far below any difference.
    cost_scale = (np.abs(costs).max() or 1.0) / 1e4
    spent_scale = spent.max() or 1.0
    one_each = LinearConstraint(kron(eye(units), np.ones((1, options)), format="csr"), 1, 1)
    bounds = Bounds(0, is_option.ravel().astype(float))
    limit = budget / spent_scale
    row = spent.reshape(1, -1) / spent_scale
    for _ in range(100):
        with _no_output():
            found = milp(
                costs.ravel() / cost_scale,
                integrality=np.ones(costs.size),
                bounds=bounds,
                constraints=[one_each, LinearConstraint(row, -np.inf, limit)],
                options={"mip_rel_gap": 0.0},
            )
        if found.x is None:
            break
        picked = found.x.reshape(units, options).argmax(axis=1)
        over = spent[np.arange(units), picked].sum() - budget
        if over <= SLACK * budget:
            return picked
        # The solver's tolerance let a choice through that is over the budget by less than 1e-6.
        limit -= max(over / spent_scale, 1e-7)
    return np.where(is_option, spent, np.inf).argmin(axis=1)


@contextmanager
def _no_output() -> Iterator[None]:
    """Drop what the solver's C++ code prints to stdout, which is for results."""
    sys.stdout.flush()
    try:
        before, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # no stdout, or no descriptors left
        yield
        return
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(before, 1)
        os.close(before)
        os.close(nowhere)


def _is_dominated(costs: np.ndarray, spent: np.ndarray) -> np.ndarray:
    """Options beside one that costs and spends no more, and is better in one or comes first."""
    units, options = costs.shape
    # By spending, then cost, then place: what follows a smaller or equal cost is dominated.
    order = np.lexsort((np.broadcast_to(np.arange(options), costs.shape), costs, spent), axis=1)
    sorted_costs = np.take_along_axis(costs, order, axis=1)
    before = np.minimum.accumulate(sorted_costs, axis=1)
    late = np.zeros((units, options), bool)
    late[:, 1:] = sorted_costs[:, 1:] >= before[:, :-1]
    found = np.zeros_like(late)
    np.put_along_axis(found, order, late, axis=1)
    return found
