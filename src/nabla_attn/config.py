"""Algorithm strings <-> SparseConfig, which holds every rule of a map."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any

GRAMMAR = (
    "nabla-THRESHOLD, topk-SHARE, sta-FRAMES-HEIGHT-WIDTH, two of them joined by '_', with "
    "_block-FRAMES-HEIGHT-WIDTH behind them for other blocks than 1-8-8, _keep-first-frame, "
    "_pair-union or _pair-pool, _tail-mean or _tail-first; or dense"
)
PAIRINGS = ("union", "pool")
TAILS = ("mean", "first")


@dataclass(frozen=True, kw_only=True)
class SparseConfig:
    """Which blocks attention keeps: by content, by a window, or the union of both.

    With neither, attention is dense.

    Args:
        threshold: Kept probability mass per row of the pooled map, in (0, 1].
        topk: Kept share of each row's blocks, in (0, 1]; instead of a threshold.
        window: Sides of the sliding window along (frames, height, width), in blocks.
        block: Tokens of a block along (frames, height, width); None leaves those of the grid,
            1x8x8 unless it says otherwise.
        keep_first_frame: Whether every block attends the first frame of its clip, whatever its
            score.
        pair_queries: How two neighbouring query blocks share one map, which suits taller GPU tiles
            and changes the result: "union" keeps what either keeps, "pool" pools their queries
            together. None leaves every block its own map.
        tail: How the blocks that the map drops are estimated: "mean" attends the mean key and value
            of each, "first" adds how their tokens differ from these means, to first order. None
            leaves them out, as NABLA does.

    Raises:
        ValueError: A value is out of range, both threshold and topk are given, or there is a rule
            about blocks and nothing that drops any.
    """

    threshold: float | None = None
    topk: float | None = None
    window: tuple[int, int, int] | None = None
    block: tuple[int, int, int] | None = None
    keep_first_frame: bool = False
    pair_queries: str | None = None
    tail: str | None = None

    def __post_init__(self) -> None:
        if self.threshold is not None and self.topk is not None:
            raise ValueError("give either a threshold (nabla) or a share (topk), not both.")
        for field, name, meaning in (
            ("threshold", "nabla threshold", "the kept probability mass"),
            ("topk", "topk share", "kept blocks / all blocks"),
        ):
            # Plain numbers, since they end in JSON and in strings.
            object.__setattr__(self, field, _checked_share(name, getattr(self, field), meaning))
        for field in ("window", "block"):
            object.__setattr__(self, field, _checked_sides(field, getattr(self, field)))
        if type(self.keep_first_frame) is not bool:
            raise ValueError(f"keep_first_frame must be a bool: got {self.keep_first_frame!r}.")
        for field, known in (("pair_queries", PAIRINGS), ("tail", TAILS)):
            if getattr(self, field) not in (None, *known):
                raise ValueError(
                    f"unknown {field} {getattr(self, field)!r}; expected None or one of {known}."
                )
        rules: dict[str, Any] = {"a block": self.block, "keep-first-frame": self.keep_first_frame}
        rules |= {"a pairing": self.pair_queries, "a tail": self.tail}
        for rule, value in rules.items():
            if value and self.is_dense:
                raise ValueError(
                    f"{rule} needs a threshold, a share or a window; dense has no blocks."
                )

    @property
    def is_dense(self) -> bool:
        """Whether nothing is dropped because no rule was given."""
        return self.threshold is None and self.topk is None and self.window is None

    @property
    def is_adaptive(self) -> bool:
        """Whether the map depends on queries and keys."""
        return self.threshold is not None or self.topk is not None

    def __str__(self) -> str:
        parts = [(part, getattr(self, part.field)) for part in _PARTS]
        return "_".join(part.write(value) for part, value in parts if value) or "dense"


def parse(text: str) -> SparseConfig:
    """Read an algorithm string such as `nabla-0.6_sta-11-3-3`, its parts in any order.

    Window sides are frames, height, width in blocks, as in the reference
    (wan/modules/model.py:145-159); sides of a block are the same in tokens.

    Raises:
        ValueError: A part is not one of the grammar's, or is out of range; the message names it.
    """
    if not isinstance(text, str):
        raise ValueError(f"an algorithm is a string{_example(text)}: got {text!r}.")
    if not text.strip():
        raise ValueError(f"the algorithm must not be empty: got {text!r}. Expected {GRAMMAR}.")
    text = text.strip()
    if text == "dense":
        return DENSE
    values: dict[str, Any] = {}
    for part in text.split("_"):
        field, value = _parse_part(part, text)
        if field in values:
            raise ValueError(f"'{part}' in '{text}' repeats a rule. Expected {GRAMMAR}.")
        values[field] = value
    try:
        return SparseConfig(**values)
    except ValueError as error:
        raise ValueError(f"'{text}': {error}") from None


def as_config(algorithm: SparseConfig | str) -> SparseConfig:
    """An algorithm as it is, or parsed.

    Raises:
        ValueError: It is neither.
    """
    return algorithm if isinstance(algorithm, SparseConfig) else parse(algorithm)


def _example(value: Any) -> str:
    is_share = isinstance(value, int | float) and 0 < value <= 1
    return f' such as "nabla-{_show_number(value) if is_share else 0.7}"'


@dataclass(frozen=True)
class _Part:
    """One part of an algorithm string: `NAME-VALUE-VALUE`.

    Attributes:
        name: What it begins with.
        field: The field of `SparseConfig` that it stands for.
        form: What is said to those who wrote it wrongly.
        read: The field's value from the text behind the name; None where it is none.
        show: The text behind the name from the field's value.
    """

    name: str
    field: str
    form: str
    read: Callable[[str], Any]
    show: Callable[[Any], str]

    def write(self, value: Any) -> str:
        return f"{self.name}-{self.show(value)}"


def _parse_part(text: str, whole: str) -> tuple[str, Any]:
    name, _, rest = text.partition("-")
    part = _BY_NAME.get(name)
    value = None if part is None else part.read(rest)
    if part is None or value is None:
        where = f"'{text}'" if text == whole else f"'{text}' in '{whole}'"
        forms = {part.name: part.form for part in _PARTS} | {"dense": "dense alone"}
        raise ValueError(f"{where} is not an algorithm. Expected {forms.get(name, GRAMMAR)}.")
    return part.field, value


def _read_number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\d+(\.\d*)?|\.\d+", text) else None


def _show_number(value: float) -> str:
    """Shortest decimal form that reads back to the same number, never with an exponent."""
    text = repr(float(value))
    if "e" in text:
        digits = -math.floor(math.log10(value)) + 17
        text = f"{value:.{digits}f}".rstrip("0")
    return text.removesuffix(".0")


def _read_sides(text: str) -> tuple[int, ...] | None:
    sides = text.split("-")
    if len(sides) != 3 or not all(side.isascii() and side.isdigit() for side in sides):
        return None
    return tuple(int(side) for side in sides)


def _show_sides(sides: tuple[int, int, int]) -> str:
    return "-".join(map(str, sides))


_PARTS = (
    _Part(
        "nabla",
        "threshold",
        "nabla-THRESHOLD with one number such as nabla-0.7",
        _read_number,
        _show_number,
    ),
    _Part(
        "topk", "topk", "topk-SHARE with one number such as topk-0.2", _read_number, _show_number
    ),
    _Part(
        "sta",
        "window",
        "sta-FRAMES-HEIGHT-WIDTH with three whole numbers such as sta-11-3-3",
        _read_sides,
        _show_sides,
    ),
    _Part(
        "block",
        "block",
        "block-FRAMES-HEIGHT-WIDTH with three whole numbers such as block-4-4-4",
        _read_sides,
        _show_sides,
    ),
    _Part(
        "keep",
        "keep_first_frame",
        "keep-first-frame",
        lambda text: True if text == "first-frame" else None,
        lambda value: "first-frame",
    ),
    _Part(
        "pair",
        "pair_queries",
        "pair-union or pair-pool",
        lambda text: text if text in PAIRINGS else None,
        str,
    ),
    _Part(
        "tail",
        "tail",
        "tail-mean or tail-first",
        lambda text: text if text in TAILS else None,
        str,
    ),
)
_BY_NAME = {part.name: part for part in _PARTS}


def _checked_share(name: str, value: float | None, meaning: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value <= 1:
        raise ValueError(f"{name} must be in (0, 1], {meaning}: got {value}.")
    return float(value)


def _checked_sides(name: str, value: tuple[int, int, int] | None) -> tuple[int, int, int] | None:
    if value is None:
        return None
    sides = tuple(value) if isinstance(value, Iterable) else ()
    valid = len(sides) == 3 and all(type(side) is int and side >= 1 for side in sides)
    if not valid:
        raise ValueError(
            f"{name} sides must be three positive integers (frames, height, width): got {value}."
        )
    return sides  # type: ignore[return-value]


DENSE = SparseConfig()
