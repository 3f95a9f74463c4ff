"""A method's required numbers, set so that it keeps a given share of the token pairs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp
from typing import Any

from nabla_attn import methods
from nabla_attn.config import SparseConfig, parse
from nabla_attn.methods.contract import Method

BRACKET = (-24.0, -12.0, -6.0, -3.0, -1.5, 0.0, 0.5, 1.5, 3.0, 6.0, 12.0)
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
WINDOWS = tuple((f, h, w) for f in (1, 3, 5, 7, 9, 11) for h in (1, 3, 5) for w in (1, 3, 5))
LOW_ODDS, HIGH_ODDS = -7.0, 9.0
"""Logarithms of the odds between which a share lies."""
TABLE_VALUES = (0.1, 0.3, 1.0, 2.0)
"""Numbers tried where each needs a table of its own and is no share."""
CLOSE = 0.01
"""A density is reached where it is no further away than this share of it."""


@dataclass(frozen=True)
class Setting:
    """A method at a density: what its knob was set to, and the density that gave.

    Attributes:
        method: Its name, with the numbers that were given.
        wanted: The density asked for; None where the method has no knob.
        algorithm: The string.
        density: What it came to on the calls that set it.
    """

    method: str
    wanted: float | None
    algorithm: str
    density: float


def row_of(name: str) -> Method:
    """The row of a method that may have numbers behind its name, as `Knob` takes them."""
    return methods.find(name.partition("-")[0])


class Knob:
    """The required parameters of a method, and the density at every value that was tried.

    Args:
        name: The method; numbers behind its name are kept, each named: "svg2-queries=24-keys=72".
        density_of: Measures the density of an algorithm.
        suffix: What stands behind the method, such as "_block-4-4-4".
        num_tries: Bisections for one density.
    """

    def __init__(
        self,
        name: str,
        density_of: Callable[[SparseConfig], float],
        *,
        suffix: str = "",
        num_tries: int = 9,
    ) -> None:
        self._name, self._given = name, name.partition("-")[2]
        self._method, self._suffix, self._num_tries = row_of(name), suffix, num_tries
        self._density_of = density_of
        self._tried: dict[Any, float | None] = {}
        self._refused = ValueError(f"no value of {name} was tried.")

    def set(self, wanted: float) -> Setting:
        """The nearest setting found for a density, which a method without parameters ignores.

        Raises:
            ValueError: The method takes none of the values that were tried on these calls.
        """
        if not self._method.parameters:
            return self._setting(None, None)
        for value in self._values(wanted):
            self._at(value)
        known = {value: near for value, near in self._tried.items() if near is not None}
        if not known:
            raise self._refused
        return self._setting(min(known, key=lambda value: abs(known[value] - wanted)), wanted)

    def _setting(self, value: Any, wanted: float | None) -> Setting:
        density = self._at(value)
        if density is None:
            raise self._refused
        return Setting(self._name, wanted, str(self._config(value)), density)

    def _values(self, wanted: float) -> Iterator[Any]:
        knob = self._method.parameters[0]
        if "table" in self._method.needs:
            # Each value costs a calibration.
            yield from (wanted,) if knob.is_share else TABLE_VALUES
        elif knob.num_parts == 3:
            yield from WINDOWS
        elif knob.is_share:
            yield from self._bisect(_share, wanted, LOW_ODDS, HIGH_ODDS)
        elif type(knob.read("1")) is int:
            yield from COUNTS
            yield from self._refine(wanted, COUNTS)
        else:
            yield from BRACKET
            yield from self._refine(wanted, BRACKET)

    def _at(self, value: Any) -> float | None:
        """The density at a value; None where the method does not take it."""
        if value not in self._tried:
            try:
                config = self._config(value)
                self._tried[value] = self._density_of(config)
            except ValueError as error:
                self._tried[value], self._refused = None, error
        return self._tried[value]

    def _config(self, value: Any) -> SparseConfig:
        parameters = self._method.parameters
        if not parameters:
            return parse(f"{self._method.name}{self._suffix}")
        first, *others = parameters
        # Numbers that must be given go together: minference's columns and diagonals.
        required = [p for p in others if p.default is None and f"{p.name}=" not in self._given]
        values = [first.show(value), *(f"{each.name}={each.show(value)}" for each in required)]
        text = "-".join(filter(None, (self._method.name, *values, self._given)))
        return parse(f"{text}{self._suffix}")

    def _bisect(
        self,
        value_at: Callable[[float], Any],
        wanted: float,
        low: float,
        high: float,
        *,
        rises: bool = True,
    ) -> Iterator[Any]:
        for _ in range(self._num_tries):
            middle = float(f"{(low + high) / 2:.4g}")
            yield value_at(middle)
            density = self._at(value_at(middle))
            if density is not None and abs(density - wanted) <= CLOSE * wanted:
                return
            is_over = density is not None and (density > wanted) == rises
            low, high = (low, middle) if is_over else (middle, high)

    def _refine(self, wanted: float, bracket: Sequence[float]) -> Iterator[float]:
        """Bisect between the two neighbours that have the density between them, to their type."""
        read = type(bracket[0])
        ends = [(value, density) for value in bracket if (density := self._at(value)) is not None]
        for (low, below), (high, above) in pairwise(ends):
            if min(below, above) <= wanted <= max(below, above):
                yield from self._bisect(read, wanted, low, high, rises=below < above)
                return


def _share(odds: float) -> float:
    """A share from the logarithm of its odds: fine near 0 and near 1."""
    return float(f"{1 / (1 + exp(-odds)):.5g}")
