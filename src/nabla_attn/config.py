"""Algorithm strings: `parse("nabla-0.6_sta-11-3-3")` <-> SparseConfig."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real

GRAMMAR = (
    "nabla-THRESHOLD, topk-SHARE, sta-FRAMES-HEIGHT-WIDTH, two of them joined by '_', with "
    "_block-FRAMES-HEIGHT-WIDTH behind them for other blocks than 1-8-8, or dense"
)
_NUMBER = re.compile(r"\d+(\.\d*)?|\.\d+")


@dataclass(frozen=True, kw_only=True)
class SparseConfig:
    """Which blocks attention keeps: by content, by a window, or the union of both.

    With neither, attention is dense.

    Args:
        threshold: kept probability mass per row of the pooled map, in (0, 1].
        topk: kept share of each row's blocks, in (0, 1]; instead of a threshold.
        window: sides of the sliding window along (frames, height, width), in blocks.
        block: tokens of a block along (frames, height, width); None leaves those of the grid,
            1x8x8 unless it says otherwise.

    Raises:
        ValueError: a value is out of range, both threshold and topk are given, or a block without
            any of them.
    """

    threshold: float | None = None
    topk: float | None = None
    window: tuple[int, int, int] | None = None
    block: tuple[int, int, int] | None = None

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
        if self.block is not None and self.is_dense:
            raise ValueError("a block needs a threshold, a share or a window; dense has no blocks.")

    @property
    def is_dense(self) -> bool:
        """Whether nothing is dropped because no rule was given."""
        return self.threshold is None and self.topk is None and self.window is None

    @property
    def is_adaptive(self) -> bool:
        """Whether the map depends on queries and keys."""
        return self.threshold is not None or self.topk is not None

    def __str__(self) -> str:
        parts = []
        if self.threshold is not None:
            parts.append(f"nabla-{_format(self.threshold)}")
        if self.topk is not None:
            parts.append(f"topk-{_format(self.topk)}")
        if self.window is not None:
            parts.append("sta-" + "-".join(str(side) for side in self.window))
        if self.block is not None:
            parts.append("block-" + "-".join(str(side) for side in self.block))
        return "_".join(parts) or "dense"


def parse(text: str) -> SparseConfig:
    """Read an algorithm string such as `nabla-0.6_sta-11-3-3`, its parts in any order.

    Window sides are frames, height, width in blocks, as in the reference
    (wan/modules/model.py:145-159); sides of a block are the same in tokens.

    Raises:
        ValueError: names the part at fault.
    """
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the algorithm must not be empty: got {text!r}. Expected {GRAMMAR}.")
    text = text.strip()
    if text == "dense":
        return DENSE
    values: dict[str, float | tuple[int, int, int]] = {}
    for part in text.split("_"):
        field, value = _parse_part(part, text)
        if field in values:
            raise ValueError(f"'{part}' in '{text}' repeats a rule. Expected {GRAMMAR}.")
        values[field] = value
    try:
        return SparseConfig(**values)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"'{text}': {error}") from None


def as_config(algorithm: SparseConfig | str) -> SparseConfig:
    """An algorithm as it is, or parsed.

    Raises:
        ValueError: it is neither.
    """
    return algorithm if isinstance(algorithm, SparseConfig) else parse(algorithm)


def _parse_part(part: str, text: str) -> tuple[str, float | tuple[int, int, int]]:
    name, *numbers = part.split("-")
    where = f"'{part}'" if part == text else f"'{part}' in '{text}'"
    if name in ("nabla", "topk") and len(numbers) == 1 and _NUMBER.fullmatch(numbers[0]):
        return {"nabla": "threshold", "topk": "topk"}[name], float(numbers[0])
    fields = {"sta": "window", "block": "block"}
    if name in fields and len(numbers) == 3 and all(n.isascii() and n.isdigit() for n in numbers):
        frames, height, width = (int(number) for number in numbers)
        return fields[name], (frames, height, width)
    forms = {
        "nabla": "nabla-THRESHOLD with one number such as nabla-0.7",
        "topk": "topk-SHARE with one number such as topk-0.2",
        "sta": "sta-FRAMES-HEIGHT-WIDTH with three whole numbers such as sta-11-3-3",
        "block": "block-FRAMES-HEIGHT-WIDTH with three whole numbers such as block-4-4-4",
        "dense": "dense alone",
    }
    raise ValueError(f"{where} is not an algorithm. Expected {forms.get(name, GRAMMAR)}.")


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


def _format(value: float) -> str:
    """Shortest decimal form that reads back to the same number, never with an exponent."""
    text = repr(float(value))
    if "e" in text:
        digits = -math.floor(math.log10(value)) + 17
        text = f"{value:.{digits}f}".rstrip("0")
    return text.removesuffix(".0")


DENSE = SparseConfig()
