"""Architectures of ISyNet: stages of blocks of convolutions, as a string."""

import re
from dataclasses import dataclass, replace
from typing import Any

DEFAULT_HEAD = 1280
BASE_CHANNELS = 16
MAX_STAGES, MAX_BLOCKS, MAX_EDGES, MAX_WIDTH, MAX_EXPANSION, MAX_HEAD = 8, 64, 8, 6, 8, 8192
GRAMMAR = (
    "one word a stage: BLOCKSxEDGE,EDGE with edges 1 3 5 7, 3s 5s 7s (separable) or 3d 5d 7d "
    "(depthwise), then + (add), l (last linear), wN (width doubled N times), eN (hidden N times as "
    "wide); at the end hN for a head other than 1280, such as 1x5 2x3,3+ 4x3,3,1+w1 h256"
)
_EDGE = re.compile(r"1|[357][sd]?")
_STAGE = re.compile(r"(\d{1,3})x([0-9sd,]+)((?:\+|l|w\d{1,2}|e\d{1,2})*)")
_HEAD = re.compile(r"h(\d{1,5})")
_MODIFIER = re.compile(r"\+|l|w\d+|e\d+")


@dataclass(frozen=True)
class Stage:
    """Equal blocks at one resolution; the first halves it and has no skip.

    Attributes:
        edges: Convolutions of a block in order: `"3"` is 3x3, `"3s"` 3x1 then 1x3, `"3d"` depthwise
            3x3 then 1x1. Each is followed by one batch norm and a ReLU.
        num_blocks: Number of blocks.
        has_skip: Whether blocks after the first add their input to their result.
        width_log2: How often the stage's channels are doubled.
        expansion: Channels inside a block, in channels of the stage.
        is_linear: Whether the last convolution of a block has no ReLU.
    """

    edges: tuple[str, ...]
    num_blocks: int = 1
    has_skip: bool = False
    width_log2: int = 0
    expansion: int = 1
    is_linear: bool = False

    def __post_init__(self) -> None:
        if not 1 <= len(self.edges) <= MAX_EDGES:
            raise ValueError(f"a block has 1 to {MAX_EDGES} edges, got {len(self.edges)}.")
        for edge in self.edges:
            if not _EDGE.fullmatch(edge):
                raise ValueError(f"unknown edge {edge!r}. Known: 1 3 5 7 3s 5s 7s 3d 5d 7d.")
        _check_range("a stage's blocks", self.num_blocks, 1, MAX_BLOCKS)
        _check_range("a stage's width (wN)", self.width_log2, 0, MAX_WIDTH)
        _check_range("a stage's expansion (eN)", self.expansion, 1, MAX_EXPANSION)

    def __str__(self) -> str:
        skip, linear = "+" * self.has_skip, "l" * self.is_linear
        width = f"w{self.width_log2}" if self.width_log2 else ""
        expansion = f"e{self.expansion}" if self.expansion > 1 else ""
        return f"{self.num_blocks}x{','.join(self.edges)}{skip}{linear}{width}{expansion}"


@dataclass(frozen=True)
class Architecture:
    """The stages of a network and the width of its head.

    Attributes:
        stages: The stages; each halves the resolution.
        head_width: Channels of the 1x1 convolution before the pool; 0 for none.
    """

    stages: tuple[Stage, ...]
    head_width: int = DEFAULT_HEAD

    def __post_init__(self) -> None:
        _check_range("an architecture's stages", len(self.stages), 1, MAX_STAGES)
        _check_range("the head's width (hN)", self.head_width, 0, MAX_HEAD)

    def __str__(self) -> str:
        head = [] if self.head_width == DEFAULT_HEAD else [f"h{self.head_width}"]
        return " ".join([*map(str, self.stages), *head])

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each stage: 16, 32, 64 and so on, times its width."""
        return tuple(
            BASE_CHANNELS << (index + stage.width_log2) for index, stage in enumerate(self.stages)
        )

    @property
    def num_blocks(self) -> tuple[int, ...]:
        """Number of blocks of each stage."""
        return tuple(stage.num_blocks for stage in self.stages)

    def with_blocks(self, num_blocks: tuple[int, ...]) -> "Architecture":
        """The same blocks, another number of them in each stage."""
        if len(num_blocks) != len(self.stages):
            raise ValueError(
                f"{len(self.stages)} stages need as many numbers of blocks, got {num_blocks}."
            )
        stages = zip(self.stages, num_blocks, strict=True)
        return replace(
            self, stages=tuple(replace(stage, num_blocks=count) for stage, count in stages)
        )

    def depthwise_twin(self) -> "Architecture":
        """The same network with its convolutions above 1x1, except the first, depthwise."""
        stages = [
            replace(stage, edges=tuple(_to_depthwise(edge) for edge in stage.edges))
            for stage in self.stages
        ]
        first = (self.stages[0].edges[0], *stages[0].edges[1:])
        return replace(self, stages=(replace(stages[0], edges=first), *stages[1:]))


def parse(text: str) -> Architecture:
    """Read an architecture string; `str` of the result gives it back.

    Raises:
        ValueError: Not such a string; the word and the grammar are named.
    """
    words = text.split()
    head = DEFAULT_HEAD
    if words and (found := _HEAD.fullmatch(words[-1])):
        head = int(found[1])
        words = words[:-1]
    if not words:
        raise ValueError(f"an architecture has at least one stage, got {text!r}. Write {GRAMMAR}.")
    return Architecture(tuple(_parse_stage(word) for word in words), head)


def _parse_stage(word: str) -> Stage:
    found = _STAGE.fullmatch(word)
    if not found:
        raise ValueError(f"cannot read the stage {word[:80]!r}. Write {GRAMMAR}.")
    blocks, edges, rest = found.groups()
    modifiers = _MODIFIER.findall(rest)
    kinds = [modifier[0] for modifier in modifiers]
    if len(set(kinds)) != len(kinds):
        raise ValueError(f"the stage {word!r} says one thing twice: {rest!r}.")
    values = {modifier[0]: modifier[1:] for modifier in modifiers}
    try:
        return Stage(
            tuple(edges.split(",")),
            int(blocks),
            has_skip="+" in values,
            width_log2=int(values.get("w", 0)),
            expansion=int(values.get("e", 1)),
            is_linear="l" in values,
        )
    except ValueError as error:
        raise ValueError(f"stage {word!r}: {error}") from error


def _to_depthwise(edge: str) -> str:
    return edge if edge == "1" else f"{edge[0]}d"


def _check_range(what: str, value: Any, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(
            f"{what} must be a whole number from {least} to {most}, got {value!r:.80}."
        )
