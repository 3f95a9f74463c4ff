"""Rules of a schedule for some layers, heads and steps, and how they are written in JSON."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from nabla_attn.config import SparseConfig, parse

FIELDS = ("layers", "heads", "steps")
MAX_NUMBERS = 4096
"""Most layers, heads or steps of a rule: JSON from others may ask for any range."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """An algorithm for some layers, heads and steps; what is None is all of them.

    Args:
        algorithm: The algorithm.
        layers: Numbers of layers; negative ones count from the end.
        heads: Numbers of heads, from 0.
        steps: Numbers of denoising steps, from 0.
        reuse_steps: Steps that one map of these heads serves: those with the same
            `step // reuse_steps`. None leaves it to the schedule.

    Raises:
        ValueError: A value is of another type, a list is empty or has a number twice, or a head or
            step is negative.
    """

    algorithm: SparseConfig
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    steps: tuple[int, ...] | None = None
    reuse_steps: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.algorithm, SparseConfig):
            raise ValueError(f"a rule holds what `parse` makes of a string: got {self.algorithm!r}")
        for name in FIELDS:
            object.__setattr__(self, name, _checked(name, getattr(self, name)))
        reuse = self.reuse_steps
        if reuse is not None and (type(reuse) is not int or reuse < 1):
            raise ValueError(f"reuse_steps must be a whole number, 1 or more: got {reuse!r}.")

    def is_for(self, step: int, layer_names: Iterable[int]) -> bool:
        """Whether the rule is about this step and a layer with one of these numbers."""
        if self.steps is not None and step not in self.steps:
            return False
        return self.layers is None or any(name in self.layers for name in layer_names)

    def __str__(self) -> str:
        parts = [
            f"{name[:-1] if len(numbers) == 1 else name} {write_numbers(numbers)}"
            for name in FIELDS
            if (numbers := getattr(self, name)) is not None
        ]
        reuse = f", one map for {self.reuse_steps} steps" if (self.reuse_steps or 1) > 1 else ""
        return f"{' '.join(parts) or 'everywhere'}: {self.algorithm}{reuse}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: numbers as text such as "0-2, 5"."""
        values: dict[str, Any] = {
            name: write_numbers(getattr(self, name))
            for name in FIELDS
            if getattr(self, name) is not None
        }
        if self.reuse_steps is not None:
            values["reuse_steps"] = self.reuse_steps
        return values | {"algorithm": str(self.algorithm)}

    @classmethod
    def from_dict(cls, values: Any) -> "Rule":
        """Read what `to_dict` gave; lists of numbers are taken too.

        Raises:
            ValueError: Not an object with an algorithm, an unknown field, or a value that is none.
        """
        known = [*FIELDS, "reuse_steps", "algorithm"]
        if not isinstance(values, dict) or not isinstance(values.get("algorithm"), str):
            raise ValueError(f'a rule must be an object with an "algorithm" string: got {values!r}')
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"unknown fields of a rule {unknown}; expected some of {known}.")
        read: dict[str, Any] = {
            name: read_numbers(values[name]) for name in FIELDS if name in values
        }
        reuse = values.get("reuse_steps")
        return cls(algorithm=parse(values["algorithm"]), reuse_steps=reuse, **read)


class HeadGroup(NamedTuple):
    """Heads of a layer that do the same in a step.

    Attributes:
        heads: Their numbers, ascending.
        config: Their algorithm.
        reuse_steps: Steps that one map of theirs serves.
    """

    heads: tuple[int, ...]
    config: SparseConfig
    reuse_steps: int


def write_numbers(numbers: Iterable[int]) -> str:
    """Whole numbers as text, runs of three and more as a range: "0-2, 5"."""
    ordered = sorted(numbers)
    parts: list[str] = []
    for _, run in groupby(enumerate(ordered), key=lambda pair: (pair[1] < 0, pair[1] - pair[0])):
        some = [number for _, number in run]
        is_range = len(some) > 2 and some[0] >= 0
        parts += [f"{some[0]}-{some[-1]}"] if is_range else map(str, some)
    return ", ".join(parts)


def read_numbers(value: Any) -> tuple[int, ...]:
    """Whole numbers of text such as "0-2, 5", or of a list.

    Raises:
        ValueError: It is neither, or a range ends before it begins.
    """
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, str):
        raise ValueError(f'numbers are written as "0-2, 5" or as a list: got {value!r}.')
    numbers: list[int] = []
    for part in value.split(","):
        found = re.fullmatch(r"\s*(?:(\d{1,9})-(\d{1,9})|(-?\d{1,9}))\s*", part)
        if found is None:
            raise ValueError(f'numbers are written as "0-2, 5": got {value!r}.')
        first, last = int(found[1] or found[3]), int(found[2] or found[3])
        if not 0 <= last - first < MAX_NUMBERS:
            raise ValueError(f"a range goes up, by less than {MAX_NUMBERS}: got {part.strip()!r}.")
        numbers += range(first, last + 1)
    return tuple(numbers)


def _checked(name: str, numbers: Any) -> tuple[int, ...] | None:
    if numbers is None:
        return None
    if isinstance(numbers, str) or not isinstance(numbers, Iterable):
        raise ValueError(f"{name} of a rule must be a list of whole numbers: got {numbers!r}.")
    found = tuple(numbers)
    if not found or any(type(number) is not int for number in found):
        raise ValueError(f"{name} of a rule must be whole numbers, one or more: got {numbers!r}.")
    if len(set(found)) < len(found):
        raise ValueError(f"{name} of a rule name a number twice: got {write_numbers(found)}.")
    if name != "layers" and min(found) < 0:
        raise ValueError(f"{name} count from 0: got {min(found)}.")
    return tuple(sorted(found))
