"""Orders of a video's tokens: which token stands where before the sequence is cut into blocks.

Blocks are cut from consecutive tokens, so an order decides which tokens share a block. Every order
is a permutation for any size: a tensor that lists the raster index of the token at each position.

| name | order |
|---|---|
| `raster` | frame, row, column, as models have it |
| `thw`, `twh`, `htw`, `hwt`, `wth`, `wht` | axes from slowest to fastest; `hwt` is token-major |
| `tiles-T-H-W` | tiles of that many frames, rows and columns, and inside a tile raster |
| `tubes-H-W` | tiles through all frames |
| `iwin-T-H-W` | interleaved windows: tokens of one window lie evenly over the video |
| `morton` | Z-order |
| `hilbert` | Hilbert's curve through the enclosing cube, what lies outside left out |
| `gilbert` | the generalised Hilbert curve, whose steps lead to neighbours at any even size |
| `slices-T` | a `gilbert` curve through every T frames, each beginning near the end of the last |
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from math import prod

import torch
from torch import Tensor

from nabla_attn.shapes import Int

Sizes = tuple[int, int, int]

FORMS = (
    "raster, thw, twh, htw, hwt, wth, wht, tiles-FRAMES-HEIGHT-WIDTH, tubes-HEIGHT-WIDTH, "
    "iwin-FRAMES-HEIGHT-WIDTH, morton, hilbert, gilbert or slices-FRAMES"
)


@dataclass(frozen=True)
class TokenOrder:
    """A named order; `str` gives the text that `parse_order` reads.

    Args:
        name: One of the table above.
        sides: The numbers behind the name, if it has any.

    Raises:
        ValueError: The name is unknown, or has other numbers behind it.
    """

    name: str = "raster"
    sides: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        rule = _RULES.get(self.name)
        if rule is None or len(self.sides) != rule.num_sides:
            raise ValueError(f"'{self}' is not a token order. Expected {FORMS}.")
        if min(self.sides, default=1) < 1:
            raise ValueError(f"the sides of a token order are at least 1: got '{self}'.")

    def __str__(self) -> str:
        return "-".join((self.name, *map(str, self.sides)))

    def permutation(self, frames: int, height: int, width: int) -> Int[Tensor, " tokens"]:
        """Raster index of the token at every position."""
        return _RULES[self.name].build((frames, height, width), *self.sides)


def parse_order(text: str) -> TokenOrder:
    """Read an order such as `hilbert` or `tiles-4-4-4`.

    Raises:
        ValueError: The text is not one of the known orders.
    """
    name, *numbers = text.split("-")
    if not all(re.fullmatch(r"[0-9]{1,9}", number) for number in numbers):
        raise ValueError(f"'{text}' is not a token order. Expected {FORMS}.")
    return TokenOrder(name, tuple(map(int, numbers)))


def invert_order(tokens: Int[Tensor, " tokens"]) -> Int[Tensor, " tokens"]:
    """The position of every token, from the token at every position."""
    return torch.empty_like(tokens).scatter_(0, tokens, torch.arange(len(tokens)).to(tokens))


def _axes(sizes: Sizes, names: str) -> Tensor:
    tokens = torch.arange(prod(sizes)).view(sizes)
    return tokens.permute(["thw".index(name) for name in names]).flatten()


def _coordinates(sizes: Sizes) -> list[Tensor]:
    """Frame, row and column of every token in raster order."""
    axes = torch.meshgrid(*(torch.arange(size) for size in sizes), indexing="ij")
    return [axis.flatten() for axis in axes]


def tile_of_tokens(sizes: Sizes, sides: Sizes) -> Int[Tensor, " tokens"]:
    """The tile of every token in raster order, tiles counted in raster order; ragged at the ends.

    Args:
        sizes: Frames, height and width of the video.
        sides: The same of a tile.
    """
    return _number([at // side for at, side in zip(_coordinates(sizes), sides, strict=True)])


def window_of_tokens(sizes: Sizes, sides: Sizes) -> Int[Tensor, " tokens"]:
    """The interleaved window of every token: axis by axis, what its place leaves as a remainder.

    An axis of N has ceil(N / side) windows; where the side does not divide N, the last of them have
    one token less. Arguments as for `tile_of_tokens`.

    Source: Iwin (arXiv:2507.18405), Cominder/Iwin-Transformer@6f40b98
    classification/models/iwin_transformer.py.
    """
    windows = [-(-size // side) for size, side in zip(sizes, sides, strict=True)]
    return _number([at % count for at, count in zip(_coordinates(sizes), windows, strict=True)])


def _number(axes: list[Tensor]) -> Tensor:
    """One number for three, which sorts as they do."""
    number = torch.zeros_like(axes[0])
    for axis in axes:
        number = number * (int(axis.max()) + 1) + axis
    return number


def _tiles(sizes: Sizes, *sides: int) -> Tensor:
    return tile_of_tokens(sizes, sides).argsort(stable=True)  # type: ignore[arg-type]


def _tubes(sizes: Sizes, height: int, width: int) -> Tensor:
    return _tiles(sizes, sizes[0], height, width)


def _iwin(sizes: Sizes, *sides: int) -> Tensor:
    return window_of_tokens(sizes, sides).argsort(stable=True)  # type: ignore[arg-type]


def _interleave_bits(axes: list[Tensor], num_bits: int) -> Tensor:
    """One number of the bits of several, highest bits first and of those the first axis first."""
    code = torch.zeros_like(axes[0])
    for bit in reversed(range(num_bits)):
        for axis in axes:
            code = code << 1 | (axis >> bit & 1)
    return code


def _morton(sizes: Sizes) -> Tensor:
    return _interleave_bits(_coordinates(sizes), max(sizes).bit_length()).argsort()


def _hilbert(sizes: Sizes) -> Tensor:
    """Position on Hilbert's curve by J. Skilling's transform (AIP Conf. Proc. 707, 381, 2004).

    Columns are the first axis and frames the last, as in DFSAttn (arXiv:2605.23445). An axis of one
    token is left out: the curve of a single frame is flat.
    """
    axes = [at for at, size in zip(_coordinates(sizes), sizes, strict=True) if size > 1][::-1]
    if not axes:
        return torch.zeros(1, dtype=torch.long)
    num_bits = (max(sizes) - 1).bit_length()
    for bit in reversed(range(1, num_bits)):
        below = (1 << bit) - 1
        for index, axis in enumerate(axes):
            is_far = (axis >> bit & 1).bool()
            # A far half is mirrored along the first axis, a near one trades places with it.
            swap = ((axes[0] ^ axis) & below).masked_fill(is_far, 0)
            axes[0] = axes[0] ^ torch.where(is_far, below, swap)
            axes[index] = axes[index] ^ swap
    code = _interleave_bits(axes, num_bits)
    # The curve counts in Gray code: every bit flips by all bits above it.
    shift = 1
    while shift < num_bits * len(axes):
        code = code ^ (code >> shift)
        shift *= 2
    return code.argsort()


# How a box is cut: the pieces in order, each by what its three axes are in terms of the box's. `a1`
# is the first half of axis a, `a2` the rest, and with a minus it is walked backwards.
_IN_TWO = ("a1 b c", "a2 b c")
_FLAT_IN_C = ("b1 c a1", "a b2 c", "-b1 c -a2")
_FLAT_IN_B = ("c1 a1 b", "a b c2", "-c1 -a2 b")
_IN_FIVE = ("b1 c1 a1", "c a1 b2", "a -b1 -c2", "-c -a2 b2", "-b1 c1 -a2")


def _gilbert(sizes: Sizes) -> Tensor:
    """A curve from a corner along the longest axis to the next, cut in boxes until these are lines.

    Even sizes have steps to neighbours only; one frame has at most one diagonal step. Several
    frames with an odd size have more of them.

    At which proportions and into which pieces a box is cut is that of J. Červený's generalised
    Hilbert curve (github.com/jakubcerveny/gilbert, BSD-2), so the order is the same. Here all boxes
    are cut at once; one is its first position, its first token, three signed lengths and strides.
    """
    lengths, strides = torch.tensor(sizes[::-1]), torch.tensor([1, sizes[2], sizes[1] * sizes[2]])
    longest = max(range(3), key=lambda axis: lengths[axis])
    axes = [longest, *(axis for axis in range(3) if axis != longest)]
    boxes = torch.cat([torch.zeros(2, dtype=torch.long), lengths[axes], strides[axes]])[None]
    order = torch.empty(prod(sizes), dtype=torch.long)
    while len(boxes):
        is_line = (boxes[:, 2:5].abs() == 1).sum(dim=1) >= 2
        _walk_lines_(order, boxes[is_line])
        boxes = torch.cat([_cut(part, pieces) for part, pieces in _by_shape(boxes[~is_line])])
    return order


def _walk_lines_(order: Tensor, boxes: Tensor) -> None:
    """Write the tokens of boxes [position, token, lengths, strides] that are one token thick."""
    longest = boxes[:, 2:5].abs().argmax(dim=1, keepdim=True)
    length = boxes[:, 2:5].gather(1, longest).squeeze(1)
    step = boxes[:, 5:].gather(1, longest).squeeze(1) * length.sign()
    count = length.abs()
    walked = torch.arange(int(count.sum())) - (count.cumsum(0) - count).repeat_interleave(count)
    position, token, step = (x.repeat_interleave(count) for x in (boxes[:, 0], boxes[:, 1], step))
    order[position + walked] = token + walked * step


def _by_shape(boxes: Tensor) -> list[tuple[Tensor, tuple[str, ...]]]:
    a, b, c = boxes[:, 2:5].abs().unbind(1)
    is_long = (2 * a > 3 * b) & (2 * a > 3 * c)
    is_flat_in_c = ~is_long & (3 * b > 4 * c)
    is_flat_in_b = ~is_long & ~is_flat_in_c & (3 * c > 4 * b)
    rest = ~(is_long | is_flat_in_c | is_flat_in_b)
    return [
        (boxes[is_long], _IN_TWO),
        (boxes[is_flat_in_c], _FLAT_IN_C),
        (boxes[is_flat_in_b], _FLAT_IN_B),
        (boxes[rest], _IN_FIVE),
    ]


def _cut(boxes: Tensor, pieces: tuple[str, ...]) -> Tensor:
    """The pieces of boxes, without those that are empty."""
    position, token = boxes[:, 0], boxes[:, 1]
    lengths, strides = boxes[:, 2:5], boxes[:, 5:]
    halves = lengths // 2
    # Even halves can be walked without a diagonal step.
    halves = halves + lengths.sign() * ((halves % 2 == 1) & (lengths.abs() > 2))
    cut = []
    for piece in pieces:
        start, new_lengths, new_strides = token, [], []
        for part in piece.split():
            axis = "abc".index(part.strip("-12"))
            first = halves[:, axis] if part.endswith("2") else torch.zeros_like(token)
            last = halves[:, axis] if part.endswith("1") else lengths[:, axis]
            length = last - first
            if part.startswith("-"):
                first, length = last - lengths[:, axis].sign(), -length
            start = start + first * strides[:, axis]
            new_lengths.append(length)
            new_strides.append(strides[:, axis])
        cut.append(torch.stack([position, start, *new_lengths, *new_strides], dim=1))
        position = position + cut[-1][:, 2:5].prod(dim=1).abs()
    found = torch.cat(cut)
    return found[(found[:, 2:5] != 0).all(dim=1)]


def _slices(sizes: Sizes, frames: int) -> Tensor:
    """A curve through every few frames, turned so that it begins near the end of the one before.

    With one frame a slice it is the order of Jenga (arXiv:2505.16864).
    """
    total, height, width = sizes
    lengths = [min(frames, total - start) for start in range(0, total, frames)]
    curves = {length: _gilbert((length, height, width)) for length in set(lengths)}
    slices, row, column = [], 0, 0
    for index, length in enumerate(lengths):
        start, curve = index * frames, curves[length]
        frame, rows, columns = curve // (height * width), curve // width % height, curve % width
        rows = height - 1 - rows if 2 * row >= height else rows
        columns = width - 1 - columns if 2 * column >= width else columns
        slices.append(((start + frame) * height + rows) * width + columns)
        row, column = int(rows[-1]), int(columns[-1])
    return torch.cat(slices)


@dataclass(frozen=True)
class _Rule:
    """How many numbers stand behind an order's name, and what builds it from sizes and these."""

    num_sides: int
    build: Callable[..., Tensor]


def _axes_rule(names: str) -> _Rule:
    return _Rule(0, lambda sizes: _axes(sizes, names))


_RULES: dict[str, _Rule] = {
    "raster": _axes_rule("thw"),
    **{names: _axes_rule(names) for names in map("".join, permutations("thw"))},
    "tiles": _Rule(3, _tiles),
    "tubes": _Rule(2, _tubes),
    "iwin": _Rule(3, _iwin),
    "morton": _Rule(0, _morton),
    "hilbert": _Rule(0, _hilbert),
    "gilbert": _Rule(0, _gilbert),
    "slices": _Rule(1, _slices),
}
NAMES = tuple(_RULES)
