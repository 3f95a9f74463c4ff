"""Values held against their annotations, through pydantic, with complaints of one line."""

import difflib
from dataclasses import MISSING, fields
from functools import cache
from typing import TYPE_CHECKING, Any, get_type_hints

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError
    from pydantic_core import ErrorDetails

# What pydantic adds to the place of an error to say which type of a union it tried.
_TAGS = {"list", "dict", "float", "int", "str", "bool", "[key]"}
_TEXTS = {
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be above {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be below {lt}",
    "invalid-json-value": "must be a JSON value",
}


def check_values(made: Any) -> None:
    """Hold the fields of a dataclass against their annotations, strictly.

    Args:
        made: The dataclass instance; `__post_init__` may call this.

    Raises:
        ValueError: A value has another type or is out of bounds; the first one is named.
    """
    from pydantic import ValidationError

    try:
        _adapter(made.__class__).validate_python(vars(made))
    except ValidationError as error:
        raise ValueError(explain(error)) from None


def read_values(kind: Any, values: Any) -> Any:
    """An instance of a dataclass from JSON values.

    Args:
        kind: The dataclass.
        values: An object with its fields.

    Raises:
        ValueError: It is no object, a field without default is missing, a key is unknown (the
            nearest known one is named), or a value does not fit.
    """
    from pydantic import ValidationError

    known = tuple(field.name for field in fields(kind))
    if not isinstance(values, dict):
        raise ValueError(f"expected an object with {', '.join(known)}, got {values!r:.80}.")
    try:
        _adapter(kind).validate_python(values)
    except ValidationError as error:
        raise ValueError(explain(error, known)) from None
    return kind(**values)


def explain(error: "ValidationError", known: tuple[str, ...] = ()) -> str:
    """The first complaint of pydantic as a line: the place, what must be there, and what is.

    Args:
        error: The complaint.
        known: The names of fields, for a key that is none of them.
    """
    details = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in details["loc"] if part not in _TAGS)
    if details["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        near = difflib.get_close_matches(place, known, n=1)
        guess = f"Did you mean {near[0]}? " if near else ""
        return f"unknown {place}. {guess}Known: {', '.join(known)}."
    if details["type"] == "missing":
        return f"missing {place}."
    return f"{place} {_demand(details)}, got {details['input']!r:.80}."


def _demand(details: "ErrorDetails") -> str:
    text = _TEXTS.get(details["type"])
    if text is not None:
        return text.format(**details.get("ctx", {}))
    message = details["msg"].removeprefix("Value error, ")
    return message.replace("Input should be", "must be").rstrip(".")


@cache
def _adapter(kind: Any) -> "TypeAdapter[dict[str, Any]]":
    from typing import NotRequired

    from pydantic import ConfigDict, TypeAdapter, with_config
    from typing_extensions import TypedDict

    hints = get_type_hints(kind, include_extras=True)
    shapes = {
        field.name: hints[field.name]
        if field.default is field.default_factory is MISSING
        else NotRequired[hints[field.name]]
        for field in fields(kind)
    }
    config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True
    )
    # mypy knows this only with literal names.
    build: Any = TypedDict
    return TypeAdapter(with_config(config)(build(kind.__name__, shapes)))
