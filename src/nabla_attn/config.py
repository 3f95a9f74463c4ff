"""Algorithm strings <-> SparseConfig, which holds every rule of a map."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from nabla_attn import methods
from nabla_attn.core.token_orders import FORMS, NAMES, TokenOrder, parse_order
from nabla_attn.methods import MethodUse
from nabla_attn.methods.parameters import check_sides, read_sides, show_number, show_sides

PAIRINGS = ("union", "pool")
TAILS = ("mean", "first")
_SHORTHANDS = {"threshold": "nabla", "topk": "topk", "window": "sta"}
"""Keywords of `SparseConfig` for the first parameter of a method."""


@dataclass(frozen=True, kw_only=True, init=False)
class SparseConfig:
    """Which blocks attention keeps: the union of what some methods keep.

    Without any, attention is dense.

    Attributes:
        uses: Methods with their parameters, each method at most once, in the order of the list of
            methods.
        block: Tokens of a block along (frames, height, width); None leaves those of the grid,
            1x8x8 unless it says otherwise.
        order: Order of tokens from which blocks are cut, as many consecutive ones as a block has;
            None cuts the video in boxes.
        keep_first_frame: Whether every block attends the first frame of its clip, whatever its
            score.
        pair_queries: How two neighbouring query blocks share one map, which suits taller GPU tiles
            and changes the result: "union" keeps what either keeps, "pool" pools their queries
            together. None leaves every block its own map.
        tail: How the blocks that the map drops are estimated: "mean" attends the mean key and value
            of each, "first" adds how their tokens differ from these means, to first order. None
            leaves them out, as NABLA does.
    """

    uses: tuple[MethodUse, ...]
    block: tuple[int, int, int] | None
    order: TokenOrder | None
    keep_first_frame: bool
    pair_queries: str | None
    tail: str | None

    def __init__(
        self,
        *,
        uses: tuple[MethodUse, ...] = (),
        threshold: float | None = None,
        topk: float | None = None,
        window: tuple[int, int, int] | None = None,
        block: tuple[int, int, int] | None = None,
        order: TokenOrder | str | None = None,
        keep_first_frame: bool = False,
        pair_queries: str | None = None,
        tail: str | None = None,
    ) -> None:
        """Check and keep the rules.

        Args:
            uses: Methods with their parameters, made by `methods.make_use`.
            threshold: Kept probability mass per row of the pooled map, in (0, 1]; short for the
                use of that method, like the next two, and replaces one among `uses`.
            topk: Kept share of each row's blocks, in (0, 1].
            window: Sides of the sliding window along (frames, height, width), in blocks.
            block: Sides of a block in tokens; this and the rest are the attributes' values.
            order: The token order or its name.
            keep_first_frame: Whether the first frame is always kept.
            pair_queries: The pairing, "union" or "pool".
            tail: The estimate of dropped blocks, "mean" or "first".

        Raises:
            ValueError: A value is out of range, a method is given twice, or there is a rule about
                blocks and nothing that drops any.
        """
        short = {"threshold": threshold, "topk": topk, "window": window}
        short = {_SHORTHANDS[key]: value for key, value in short.items() if value is not None}
        kept = [use for use in uses if use.name not in short]
        # Its name says more than that of the parameter.
        kept += [methods.make_use(name, value) for name, value in short.items()]
        values = {
            "uses": _in_order(kept),
            "block": None if block is None else check_sides("block", block),
            "order": parse_order(order) if isinstance(order, str) else order,
            "keep_first_frame": keep_first_frame,
            "pair_queries": pair_queries,
            "tail": tail,
        }
        for key, value in values.items():
            object.__setattr__(self, key, value)
        self._check()

    def _check(self) -> None:
        if type(self.keep_first_frame) is not bool:
            raise ValueError(f"keep_first_frame must be a bool: got {self.keep_first_frame!r}.")
        for field, known in (("pair_queries", PAIRINGS), ("tail", TAILS)):
            if getattr(self, field) not in (None, *known):
                raise ValueError(
                    f"unknown {field} {getattr(self, field)!r}; expected None or one of {known}."
                )
        about: dict[str, Any] = {"a block": self.block, "an order": self.order}
        about |= {"keep-first-frame": self.keep_first_frame}
        about |= {"a pairing": self.pair_queries, "a tail": self.tail}
        for rule, value in about.items():
            if value and self.is_dense:
                raise ValueError(
                    f"{rule} needs a method that chooses blocks, such as nabla-0.7; dense has no "
                    "blocks."
                )
        fixed = [use for use in self.uses if not methods.find(use.name).takes_order]
        if self.order is not None and fixed:
            raise ValueError(
                f"{fixed[0]} chooses blocks by their place in the video, or orders tokens itself: "
                f"got _order-{self.order} beside it. Leave out one of the two."
            )

    def with_use(self, use: MethodUse) -> "SparseConfig":
        """The same with a method in place of its earlier use, or beside the others."""
        others = tuple(each for each in self.uses if each.name != use.name)
        return replace(self, uses=(*others, use))

    @property
    def threshold(self) -> float | None:
        """Kept probability mass of the method `nabla`; None without it."""
        return self._shorthand("threshold")

    @property
    def topk(self) -> float | None:
        """Kept share of the method `topk`; None without it."""
        return self._shorthand("topk")

    @property
    def window(self) -> tuple[int, int, int] | None:
        """Sides of the window of the method `sta`; None without it."""
        return self._shorthand("window")

    def _shorthand(self, key: str) -> Any:
        return next((use.values[0] for use in self.uses if use.name == _SHORTHANDS[key]), None)

    @property
    def is_dense(self) -> bool:
        """Whether nothing is dropped because no method was given."""
        return not self.uses

    @property
    def is_adaptive(self) -> bool:
        """Whether the map depends on more than the grid."""
        return any(methods.find(use.name).kind != "static" for use in self.uses)

    @property
    def needs(self) -> frozenset[str]:
        """What its methods need beside queries and keys; see `methods.contract.NEEDS`."""
        return frozenset(need for use in self.uses for need in methods.find(use.name).needs)

    @property
    def is_trainable(self) -> bool:
        """Whether gradients may flow through the output."""
        return all(methods.find(use.name).is_trainable for use in self.uses)

    def __str__(self) -> str:
        parts = [(part, getattr(self, part.field)) for part in _PARTS]
        written = [part.write(value) for part, value in parts if value]
        return "_".join([*map(str, self.uses), *written]) or "dense"

    def __repr__(self) -> str:
        return f"SparseConfig({str(self)!r})"


def grammar() -> str:
    """What an algorithm string is made of, in one sentence."""
    about = [part.form.split(" with ")[0] for part in _PARTS]
    return (
        "NAME-VALUE-VALUE of a method such as nabla-0.7, topk-0.2 or sta-11-3-3, several of them "
        f"joined by '_', with {', '.join(about)} behind them; or dense. Methods: "
        f"{', '.join(methods.names())}"
    )


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
        raise ValueError(f"the algorithm must not be empty: got {text!r}. Expected {grammar()}.")
    text = text.strip()
    if text == "dense":
        return DENSE
    uses: list[MethodUse] = []
    values: dict[str, Any] = {}
    for part in text.split("_"):
        found = _parse_part(part, text)
        if isinstance(found, MethodUse):
            if found.name in [use.name for use in uses]:
                raise ValueError(f"'{part}' in '{text}' repeats a method.")
            uses.append(found)
            continue
        field, value = found
        if field in values:
            raise ValueError(f"'{part}' in '{text}' repeats a rule.")
        values[field] = value
    try:
        return SparseConfig(uses=tuple(uses), **values)
    except ValueError as error:
        raise ValueError(f"'{text}': {error}") from None


def as_config(algorithm: SparseConfig | str) -> SparseConfig:
    """An algorithm as it is, or parsed.

    Raises:
        ValueError: It is neither.
    """
    return algorithm if isinstance(algorithm, SparseConfig) else parse(algorithm)


def _in_order(uses: list[MethodUse]) -> tuple[MethodUse, ...]:
    """Methods in the order of their list, so that equal algorithms have one string.

    Raises:
        ValueError: A method is given twice.
    """
    order = {name: index for index, name in enumerate(methods.names())}
    names = [use.name for use in uses]
    for name in names:
        methods.find(name)
        if names.count(name) > 1:
            raise ValueError(f"a method can be given once: got {name} {names.count(name)} times.")
    return tuple(sorted(uses, key=lambda use: order[use.name]))


def _example(value: Any) -> str:
    is_share = isinstance(value, int | float) and 0 < value <= 1
    return f' such as "nabla-{show_number(value) if is_share else 0.7}"'


@dataclass(frozen=True)
class _Part:
    """One part of an algorithm string beside methods: `NAME-VALUE-VALUE`.

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


def _parse_part(text: str, whole: str) -> MethodUse | tuple[str, Any]:
    name, _, rest = text.partition("-")
    where = f"'{text}'" if text == whole else f"'{text}' in '{whole}'"
    if name in methods.names():
        try:
            use = methods.read_use(name, rest)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if use is None:
            method = methods.find(name)
            raise ValueError(
                f"{where} is not an algorithm. Expected {method.form} such as {method.example}."
            )
        return use
    part = _BY_NAME.get(name)
    value = None if part is None else part.read(rest)
    if part is None or value is None:
        forms = {part.name: part.form for part in _PARTS} | {"dense": "dense alone"}
        raise ValueError(f"{where} is not an algorithm. Expected {forms.get(name) or grammar()}.")
    return part.field, value


def _read_order(text: str) -> TokenOrder | None:
    return None if text.split("-")[0] not in NAMES else parse_order(text)


_PARTS = (
    _Part(
        "block",
        "block",
        "block-FRAMES-HEIGHT-WIDTH with three whole numbers such as block-4-4-4",
        read_sides,
        show_sides,
    ),
    _Part("order", "order", f"order-ORDER with one of {FORMS}", _read_order, str),
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

DENSE = SparseConfig()
