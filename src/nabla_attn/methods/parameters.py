"""Parameters of methods: how their values are read, checked and written in algorithm strings."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from decimal import Decimal
from numbers import Integral, Real
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of a method.

    Attributes:
        name: Its name in `params` and in errors.
        form: How it is written, in capitals.
        example: A value, as text.
        default: Its value when nothing is written; None where something must be.
        read: The value from its parts of the text; None where it is none.
        show: The text of a value.
        check: The value as it is kept, or a ValueError; called with the name to be shown.
        num_parts: Parts of the text, between dashes, that it takes.
        is_share: Whether it is the kept share of something, so that 1 keeps everything.
    """

    name: str
    form: str
    example: str
    default: Any
    read: Callable[[str], Any]
    show: Callable[[Any], str]
    check: Callable[[str, Any], Any]
    num_parts: int = 1
    is_share: bool = False


def share(
    name: str, meaning: str, *, default: float | None = None, example: float = 0.2
) -> Parameter:
    """The kept share of something, in (0, 1]; `meaning` says of what."""

    def check(shown: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) <= 1:
            raise ValueError(f"{shown} must be in (0, 1], {meaning}: got {value}.")
        # Plain numbers, since they end in JSON and in strings.
        return float(value)

    parameter = _number(name, default, example, check, _read_unsigned)
    return replace(parameter, is_share=True)


def number(
    name: str,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    default: float | None = None,
    example: float = 1.0,
) -> Parameter:
    """A finite number between two others, both allowed."""

    def check(shown: str, value: Any) -> float:
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or not least <= float(value) <= most:
            raise ValueError(f"{shown} must be a number from {least} to {most}: got {value}.")
        return float(value)

    return _number(name, default, example, check, read_number)


def count(
    name: str, *, least: int = 1, most: int = 2**31, default: int | None = None, example: int = 1
) -> Parameter:
    """A whole number between two others, both allowed."""

    def check(shown: str, value: Any) -> int:
        is_whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not is_whole or not least <= value <= most:
            raise ValueError(f"{shown} must be a whole number from {least} to {most}: got {value}.")
        return int(value)

    def read(text: str) -> int | None:
        return int(text) if text.isascii() and text.isdigit() else None

    return Parameter(
        name=name,
        form=_form(name),
        example=str(example),
        default=default,
        read=read,
        show=str,
        check=check,
    )


def sides(
    name: str,
    *,
    default: tuple[int, int, int] | None = None,
    example: tuple[int, int, int] = (11, 3, 3),
) -> Parameter:
    """Three whole numbers along (frames, height, width), each at least 1."""
    return Parameter(
        name=name,
        form="FRAMES-HEIGHT-WIDTH",
        example=show_sides(example),
        default=default,
        read=read_sides,
        show=show_sides,
        check=check_sides,
        num_parts=3,
    )


def word(name: str, words: tuple[str, ...], *, default: str | None = None) -> Parameter:
    """One of some words."""

    def check(shown: str, value: Any) -> str:
        if value not in words:
            raise ValueError(f"{shown} must be one of {', '.join(words)}: got {value!r}.")
        return str(value)

    return Parameter(
        name=name,
        form=_form(name),
        example=words[0],
        default=default,
        read=lambda text: text if text in words else None,
        show=str,
        check=check,
    )


def _number(
    name: str,
    default: float | None,
    example: float,
    check: Callable[[str, Any], float],
    read: Callable[[str], float | None],
) -> Parameter:
    return Parameter(
        name=name,
        form=_form(name),
        example=show_number(example),
        default=default,
        read=read,
        show=show_number,
        check=check,
    )


def _form(name: str) -> str:
    return name.upper().replace("_", " ")


def _read_unsigned(text: str) -> float | None:
    return None if text.startswith("-") else read_number(text)


def read_number(text: str) -> float | None:
    """A decimal number without an exponent, or None."""
    return float(text) if re.fullmatch(r"-?(\d+(\.\d*)?|\.\d+)", text) else None


def show_number(value: float) -> str:
    """Shortest decimal form that reads back to the same number, never with an exponent."""
    return format(Decimal(repr(float(value))), "f").removesuffix(".0")


def read_sides(text: str) -> tuple[int, ...] | None:
    """Three whole numbers between dashes, or None."""
    parts = text.split("-")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() for part in parts):
        return None
    return tuple(int(part) for part in parts)


def show_sides(value: tuple[int, int, int]) -> str:
    """Three numbers with dashes between them."""
    return "-".join(map(str, value))


def check_sides(name: str, value: Any) -> tuple[int, int, int]:
    """Three positive whole numbers as a tuple.

    Raises:
        ValueError: It is none.
    """
    found = tuple(value) if isinstance(value, Iterable) else ()
    if len(found) != 3 or not all(type(side) is int and side >= 1 for side in found):
        raise ValueError(
            f"{name} sides must be three positive integers (frames, height, width): got {value}."
        )
    return found  # type: ignore[return-value]


def split_values(text: str) -> list[str]:
    """The parts of a text between dashes; a dash behind a dash is a minus."""
    return re.split(r"(?<=[^-])-", text) if text else []
