"""`Rates`: seconds that a machine takes for work, fitted to what was measured, and its MEM."""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nabla_attn.cost.work import TILE, Work
from nabla_attn.files import read_json, write_text
from nabla_attn.machine import machine_file

TILES = (1, 8, 16, 32)
MAX_BYTES = 2**16


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Rates:
    """Seconds a machine takes per unit of work; terms are summed, as if nothing overlapped.

    Attributes:
        name: The machine.
        matrix: Seconds per issued multiply-accumulate.
        moved: Seconds per element read or written.
        vector: Seconds per vector operation.
        weights: Seconds per element of weights, once a batch.
        kernels: Seconds per kernel launched, once a batch.
        tile_channels: Multiple that channels are padded to.
        tile_pixels: Multiple that pixels or tokens are padded to.
        batch: Images of a batch in the measurements.
        source: Where the measurements come from.
        error: Median relative error of seconds for networks of families left out of the fit; None
            where it was not measured.
    """

    name: str
    matrix: float
    moved: float = 0.0
    vector: float = 0.0
    weights: float = 0.0
    kernels: float = 0.0
    tile_channels: int = TILE
    tile_pixels: int = TILE
    batch: int = 16
    source: str = ""
    error: float | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.type in (float, int) and not (_is_number(value) and value >= 0):
                raise ValueError(f"rates: {item.name!r} must be a number from 0, got {value!r}.")
        if not self.matrix or min(self.tile_channels, self.tile_pixels, self.batch) < 1:
            raise ValueError("rates: matrix, the tiles and the batch must be positive.")

    def seconds(self, work: Work, *, batch: int | None = None) -> float:
        """Seconds for one item of a batch.

        Args:
            work: The work of one item.
            batch: Items that share launches and weights; that of the measurements by default.
        """
        return float(self._terms(work, batch or self.batch).sum())

    def mem(self, work: Work, *, batch: int | None = None) -> float:
        """Share of the seconds that useful matrix work takes, from 0 to 1.

        Padding, moved elements, vector operations and launches are the rest. Reconstructed from the
        abstract of ISyNet (arXiv:2109.01932) and fitted to the machine.
        """
        seconds = self.seconds(work, batch=batch)
        return self.matrix * work.matrix / seconds if seconds else 0.0

    def _terms(self, work: Work, batch: int) -> np.ndarray:
        row = _columns(work, self.tile_channels, self.tile_pixels, batch)
        return row * [self.matrix, self.moved, self.vector, self.weights, self.kernels]

    def save(self, path: str | Path) -> None:
        """Write the rates as JSON, whole or not at all."""
        write_text(path, json.dumps(asdict(self), indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Rates":
        """Read rates that `save` wrote.

        Raises:
            ValueError: Not such a file; it is named.
        """
        data = read_json(path, max_bytes=MAX_BYTES)
        known = {item.name for item in fields(cls)}
        if not isinstance(data, dict) or not {"name", "matrix"} <= data.keys() <= known:
            raise ValueError(f"{path} holds no rates of a machine. Measure with `isynet measure`.")
        try:
            return cls(**data)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error


ASCEND310 = Rates(
    name="ascend310",
    matrix=1.522e-13,
    moved=2.43e-11,
    kernels=5.72e-5,
    batch=16,
    source="fitted to the ten latencies published with ISyNet (fp16, batch 16, 224 pixels)",
    error=0.025,
)
"""Ascend 310, fitted to what the authors of ISyNet published; not measured by us."""


def find_rates(name: str) -> Rates:
    """Rates by name: `ascend310`, `here` for this machine's CPU, or a file that `save` wrote.

    Raises:
        ValueError: An unknown name, or this machine was not measured.
    """
    if name == ASCEND310.name:
        return ASCEND310
    if name != "here":
        if not Path(name).is_file():
            raise ValueError(
                f"unknown machine {name[:80]!r}. Known: ascend310, here, or a file of rates."
            )
        return Rates.load(name)
    if not rates_file().is_file():
        raise ValueError("this machine was not measured. Run `isynet measure` first.")
    return Rates.load(rates_file())


def rates_file() -> Path:
    """Where the rates of this machine's CPU are kept."""
    return machine_file("rates", torch.device("cpu"))


@dataclass(frozen=True)
class Fit:
    """Rates with how well they predict what they have not seen.

    Attributes:
        rates: The rates, fitted to all measurements.
        predicted: Seconds of each work, by rates fitted without its family, [works].
        measured: Seconds measured, [works].
    """

    rates: Rates
    predicted: np.ndarray
    measured: np.ndarray

    @property
    def errors(self) -> np.ndarray:
        """Relative error of each prediction, [works]."""
        return self.predicted / self.measured - 1


def fit_rates(
    name: str,
    works: Sequence[Work],
    seconds: Sequence[float],
    families: Sequence[str],
    *,
    batch: int = 16,
    terms: Sequence[str] = ("matrix", "moved", "vector", "kernels"),
    tiles: Sequence[tuple[int, int]] | None = None,
    source: str = "",
) -> Fit:
    """Fit rates by non-negative least squares on the relative error.

    Each work is predicted by rates that were fitted without its family. Among the paddings to
    choose from, the one with the least such error is taken.

    Args:
        name: Name of the machine.
        works: Work of one item of each measurement.
        seconds: Seconds measured for one item.
        families: Family of each work, which is left out together.
        batch: Items of a batch.
        terms: Terms of `Rates` to fit; the others are 0.
        tiles: Paddings (channels, pixels) to choose from; all by default.
        source: Where the measurements come from, for the reader.

    Raises:
        ValueError: Numbers of values differ, seconds are not positive, or fewer than two families.
    """
    measured = np.asarray(seconds, float)
    if not len(works) == len(measured) == len(families):
        raise ValueError(
            f"as many works, seconds and families are needed: got {len(works)}, {len(measured)} "
            f"and {len(families)}."
        )
    if len(set(families)) < 2 or not (np.isfinite(measured) & (measured > 0)).all():
        raise ValueError("fitting needs two families of works or more, and positive seconds.")
    columns = [_TERMS.index(term) for term in terms]
    groups = np.asarray(families)
    best: tuple[float, Fit] | None = None
    for channels, pixels in tiles or itertools.product(TILES, (1, TILE)):
        rows = np.stack([_columns(work, channels, pixels, batch) for work in works])
        rows = rows[:, columns]
        predicted = np.empty(len(measured))
        for family in set(families):
            own = groups == family
            predicted[own] = rows[own] @ _least_squares(rows[~own], measured[~own])
        errors = np.abs(predicted / measured - 1)
        found = dict(zip(terms, _least_squares(rows, measured).tolist(), strict=True))
        if not found.get("matrix"):
            continue
        rates = Rates(
            name=name,
            **found,
            tile_channels=channels,
            tile_pixels=pixels,
            batch=batch,
            source=source,
            error=float(np.median(errors)),
        )
        score = float(np.sqrt(np.mean(errors**2)))
        if best is None or score < best[0]:
            best = score, Fit(rates, predicted, measured)
    if best is None:
        raise ValueError(
            "the measured seconds do not grow with matrix work, so no rates fit them. Measure "
            "again on a quiet machine."
        )
    return best[1]


_TERMS = ("matrix", "moved", "vector", "weights", "kernels")


def _columns(work: Work, tile_channels: int, tile_pixels: int, batch: int) -> np.ndarray:
    issued = work.issued(tile_channels, tile_pixels)
    return np.array([issued, work.moved, work.vector, work.weights / batch, work.kernels / batch])


def _least_squares(rows: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    from scipy.optimize import nnls

    scaled = rows / seconds[:, None]
    # Columns differ by ten orders of magnitude, so each is brought to 1 before solving.
    sizes = np.abs(scaled).max(axis=0)
    sizes[sizes == 0] = 1
    return nnls(scaled / sizes, np.ones(len(rows)))[0] / sizes
