"""Every sparse attention method on one contract: one short file a method, one row each.

Nothing else knows a method's name. `find` loads the file of a method when it is asked for;
`register_method` adds a user's own.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from nabla_attn.methods.contract import Method, Moment, Selection, State
from nabla_attn.methods.parameters import Parameter, split_values

NAMES = (
    *("nabla", "topk", "sta"),
    *("sol", "pisa", "ear", "subblock", "dfs", "sparge", "draft", "xattn", "ssta", "longcat"),
    *("cube", "vsa", "sla", "lite", "losa", "haste", "bsa", "minference"),
    *("gna", "radial", "lvsa", "fps", "chipmunk", "vmoba", "dam"),
    *("iwin", "svg", "svg2", "svoo", "jenga", "paro", "vdit"),
)
"""Methods of this package, each the file of its name, in the order in which they are listed."""

_OWN: dict[str, Method] = {}
RESERVED = ("dense", "block", "order", "keep", "pair", "tail")


@dataclass(frozen=True)
class MethodUse:
    """A method with its parameters: one part of an algorithm string.

    Attributes:
        name: The method.
        values: The parameters' values, in their order.
    """

    name: str
    values: tuple[Any, ...] = ()

    def __str__(self) -> str:
        texts = []
        parameters = find(self.name).parameters
        for parameter, value in zip(parameters, self.values, strict=True):
            texts.append((parameter.show(value), value != parameter.default))
        while texts and not texts[-1][1]:
            texts.pop()
        return "-".join([self.name, *(text for text, _ in texts)])


def names() -> tuple[str, ...]:
    """The names of all methods."""
    return (*NAMES, *_OWN)


def find(name: str) -> Method:
    """The row of a method.

    Raises:
        ValueError: There is no such method; the known ones are listed.
    """
    if name in _OWN:
        return _OWN[name]
    if name not in NAMES:
        raise ValueError(f"there is no method {name!r}. Known: {', '.join(names())}.")
    row: Method = import_module(f"nabla_attn.methods.{name}").METHOD
    return row


def describe(method: Method) -> dict[str, Any]:
    """The row of a method in plain values, for lists."""
    shown = ("name", "form", "title", "kind", "exactness", "ours", "paper", "code", "licence")
    values = {field: getattr(method, field) for field in (*shown, "published", "is_trainable")}
    values["needs"] = list(method.needs)
    values["parameters"] = [
        {"name": each.name, "form": each.form, "default": each.default}
        for each in method.parameters
    ]
    return values


def make_use(name: str, *values: Any, **named: Any) -> MethodUse:
    """A method with parameters, in their order or by name; the rest are its defaults.

    Raises:
        ValueError: No such method or parameter, one is missing or given twice, a value is out of
            range, or two do not go together.
    """
    parameters = find(name).parameters
    known = [parameter.name for parameter in parameters]
    if len(values) > len(known):
        raise ValueError(f"{name} takes {len(known)} parameters {known}: got {values}.")
    given = dict(zip(known, values, strict=False))
    if odd := sorted(set(named) - set(known)) or sorted(set(named) & set(given)):
        raise ValueError(f"{name} has the parameters {known}, each once: got {', '.join(odd)}.")
    given |= named
    use = MethodUse(name, tuple(_value(name, parameter, given) for parameter in parameters))
    if check := find(name).check:
        check(find(name).params(use.values))
    return use


def why_no_table(name: str) -> str:
    """What to say where a calibrated method has no table."""
    return (
        f"{name} needs a table that calibration makes of a model: nabla calibrate --method {name} "
        "writes it into a schedule; pass that with --schedule, or schedule= in Python."
    )


def _value(name: str, parameter: Parameter, given: dict[str, Any]) -> Any:
    value = given.get(parameter.name, parameter.default)
    if value is None:
        raise ValueError(f"{name} needs its {parameter.name}: {find(name).form}.")
    # A parameter with its method's meaning needs no second word.
    is_bare = parameter.num_parts > 1
    return parameter.check(parameter.name if is_bare else f"{name} {parameter.name}", value)


def read_use(name: str, text: str) -> MethodUse | None:
    """A use from what stands behind a method's name; None where that is not its form.

    Parameters may be named (`NAME=VALUE`), and those at the end left out.

    Raises:
        ValueError: A value is out of range, or a name is unknown.
    """
    parameters = find(name).parameters
    left, values, named = split_values(text), [], {}
    for parameter in parameters:
        if not left or "=" in left[0]:
            break
        part, left = "-".join(left[: parameter.num_parts]), left[parameter.num_parts :]
        value = parameter.read(part)
        if value is None:
            return None
        values.append(value)
    by_name = {parameter.name: parameter for parameter in parameters}
    while left:
        key, equals, first = left[0].partition("=")
        if not equals:
            return None
        parameter_ = by_name.get(key)
        if parameter_ is None:
            raise ValueError(f"{name} has the parameters {list(by_name)}: got {key!r}.")
        part, left = (
            "-".join([first, *left[1 : parameter_.num_parts]]),
            left[parameter_.num_parts :],
        )
        value = parameter_.read(part)
        if value is None:
            return None
        named[key] = value
    if len(values) < len(parameters):
        missing = [
            p for p in parameters[len(values) :] if p.default is None and p.name not in named
        ]
        if missing:
            return None
    return make_use(name, *values, **named)


def register_method(
    name: str | Method,
    select: Callable[..., Any] | None = None,
    *,
    parameters: Iterable[Parameter] = (),
    **row: Any,
) -> Any:
    """Add a method of your own, for algorithm strings everywhere; also a decorator.

    Args:
        name: A word of small letters and digits, no dash or underscore; or a whole row, such as
            `contract.pooled` and `contract.static` make, and nothing beside it.
        select: `select(q, k, grid, params, state)`, which returns a `Selection` or a bare mask
            [batch or 1, heads or 1, q_blocks, kv_blocks]; see `nabla_attn.methods.contract`.
        parameters: What `params` holds, made by `nabla_attn.methods.parameters`.
        row: Other fields of `Method`.

    Raises:
        ValueError: The name is taken or no such word.
    """
    if isinstance(name, Method):
        _check_name(name.name)
        _OWN[name.name] = name
        return name
    if select is None:
        return lambda function: register_method(name, function, parameters=parameters, **row)
    _check_name(name)
    row = {"title": (select.__doc__ or name).splitlines()[0]} | row
    _OWN[name] = Method(name=name, select=select, parameters=tuple(parameters), **row)
    return select


def _check_name(name: str) -> None:
    if not (name.isascii() and name.isalnum() and name == name.lower() and name[0].isalpha()):
        raise ValueError(f"a method's name must be small letters and digits: got {name!r}.")
    if name in (*NAMES, *RESERVED):
        raise ValueError(f"the name {name!r} is taken. Choose another.")


__all__ = [
    "Method",
    "MethodUse",
    "Moment",
    "Parameter",
    "Selection",
    "State",
    "describe",
    "find",
    "make_use",
    "names",
    "read_use",
    "register_method",
    "why_no_table",
]
