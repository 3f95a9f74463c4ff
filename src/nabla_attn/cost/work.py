"""`Work`: what one forward pass asks of a machine, operator by operator."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

TILE = 16
"""Channels and pixels that plain MEM pads to: the edge of the matrix units it was made for."""


@dataclass(frozen=True)
class MatrixShape:
    """A matrix product, or a convolution written as one.

    Attributes:
        batch: Number of independent products: groups of a convolution, or a product's batch.
        rows: Rows of the left factor: pixels of a convolution's output, or tokens.
        inner: Shared dimension: input channels of a group.
        columns: Columns of the result: output channels of a group.
        taps: Kernel positions of a convolution, 1 for a product.
    """

    batch: int
    rows: int
    inner: int
    columns: int
    taps: int = 1

    def macs(self, tile_channels: int = 1, tile_pixels: int = 1) -> float:
        """Multiply-accumulates, with channels and pixels padded to multiples."""
        padded = _pad(self.rows, tile_pixels) * _pad(self.inner, tile_channels)
        return float(self.batch * self.taps * padded * _pad(self.columns, tile_channels))


@dataclass(frozen=True)
class Operator:
    """The work of one operator.

    Attributes:
        name: The operator in PyTorch's words, such as `convolution`.
        matrix: The product that it is; None where it has no matrix work.
        moved: Elements read and written.
        vector: Operations on single elements.
        weights: Elements of its weights.
        elements: Elements of its result.
        is_kernel: Whether a fused runtime launches a kernel of its own for it.
    """

    name: str
    matrix: MatrixShape | None = None
    moved: float = 0
    vector: float = 0
    weights: float = 0
    elements: float = 0
    is_kernel: bool = True


@dataclass(frozen=True)
class Work:
    """The operators of one forward pass, and their sums.

    Attributes:
        operators: What ran, in order.
        unknown: Names of operators that have no rule, with how often they ran. Their work is in no
            sum, so a figure made from such a `Work` should be shown with these names.
    """

    operators: tuple[Operator, ...] = ()
    unknown: dict[str, int] = field(default_factory=dict)

    @property
    def matrix(self) -> float:
        """Multiply-accumulates of convolutions and matrix products, depthwise ones left out."""
        return self.issued(1, 1)

    def issued(self, tile_channels: int = TILE, tile_pixels: int = TILE) -> float:
        """Multiply-accumulates that a machine runs when it pads channels and pixels."""
        shapes = (item.matrix for item in self.operators)
        return sum(shape.macs(tile_channels, tile_pixels) for shape in shapes if shape)

    @property
    def moved(self) -> float:
        """Elements read and written by matrix products, pools and copies; one read for an add."""
        return sum(item.moved for item in self.operators)

    @property
    def vector(self) -> float:
        """Operations on single elements: activations, sums, depthwise convolutions, softmax."""
        return sum(item.vector for item in self.operators)

    @property
    def weights(self) -> float:
        """Elements of the weights that matrix products read."""
        return sum(item.weights for item in self.operators)

    @property
    def kernels(self) -> int:
        """Number of kernels that a fused runtime launches."""
        return sum(item.is_kernel for item in self.operators)

    @property
    def mem(self) -> float:
        """Matrix efficiency measure without a machine: (M / P) * M / (D + V).

        M is `matrix`, P `issued`, D `moved` and V `vector`. The idea is of ISyNet
        (arXiv:2109.01932, abstract); the formula is reconstructed, since the paper's own was not
        available. It is free of units and meant for comparisons.
        """
        issued, spread = self.issued(), self.moved + self.vector
        return self.matrix / issued * self.matrix / spread if issued and spread else 0.0

    def __add__(self, other: "Work") -> "Work":
        unknown = dict(self.unknown)
        for name, count in other.unknown.items():
            unknown[name] = unknown.get(name, 0) + count
        return Work(self.operators + other.operators, unknown)

    def to_dict(self) -> dict[str, float | dict[str, int]]:
        """The sums and plain MEM as plain numbers, for a record."""
        names = ("matrix", "moved", "vector", "weights", "kernels", "mem")
        sums: dict[str, float | dict[str, int]] = {name: getattr(self, name) for name in names}
        return {**sums, "issued": self.issued(), "unknown": dict(self.unknown)}


def total(works: Iterable[Work]) -> Work:
    """The sum of several works."""
    result = Work()
    for work in works:
        result += work
    return result


def _pad(size: int, tile: int) -> int:
    return math.ceil(size / tile) * tile
