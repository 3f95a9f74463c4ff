"""DAM: the diagonals and columns that mean attention fills, found once and continued at any length.

They are those of token pairs in raster order; a block is kept where any of its pairs is.
"""

from collections.abc import Mapping
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.order import TokenLayout, block_order, to_raster
from nabla_attn.methods.contract import Method, State, TooManyTokensError
from nabla_attn.methods.parameters import number, share

# Mean attention of all pairs of tokens is held for every head: 16 MB.
MAX_TOKENS = 2048


def find_patterns(mean: Tensor, threshold: float, share: float) -> list[dict[str, list[int]]]:
    """Diagonals and columns of which a share of the pairs is high after a Box-Cox transform.

    Args:
        mean: Mean attention [heads, tokens, tokens] of one layer.
        threshold: What a transformed pair must reach; the layer's lowest is 0 where it is negative.
        share: The share of a diagonal's or column's pairs.

    Returns:
        For each head `diagonals`, the offsets from query to key, and `columns`, the keys.
    """
    root = 0.5
    values = (mean.double().clamp_min(1e-10) ** root - 1) / root
    values = values - values.min().clamp_max(0)
    high = values >= threshold
    tokens = mean.shape[-1]
    lengths = tokens - torch.arange(1 - tokens, tokens).abs()
    # Rows of one place more than they have, read one after the other: each begins a place later.
    turned = torch.nn.functional.pad(high.flip(1), (0, tokens)).flatten(1)
    turned = turned[:, : tokens * (2 * tokens - 1)].view(len(high), tokens, -1)
    on_diagonal = turned.sum(dim=1).double() / lengths
    in_column = high.double().mean(dim=1)
    return [
        {
            "diagonals": ((diagonal >= share).nonzero().flatten() - (tokens - 1)).tolist(),
            "columns": (column >= share).nonzero().flatten().tolist(),
        }
        for diagonal, column in zip(on_diagonal, in_column, strict=True)
    ]


class _MeanAttention:
    """Sums attention of the video's tokens over the calls of one layer."""

    def __init__(self, params: SimpleNamespace, grid: TokenGrid) -> None:
        if grid.num_tokens > MAX_TOKENS:
            raise TooManyTokensError(
                f"dam holds all pairs of tokens, and is calibrated on at most {MAX_TOKENS:,}: got "
                f"{grid.num_tokens:,}. Calibrate on fewer frames of the same height and width."
            )
        self._params, self._grid, self._sum, self._calls = params, grid, torch.zeros(()), 0

    def observe(self, q: Tensor, k: Tensor, v: Tensor, state: State) -> None:
        """Add the attention of one call."""
        q, k = (to_raster(x[0], self._grid, dim=1) for x in (q, k))
        probs = (q @ k.mT * state.scale).softmax(dim=-1)
        self._sum, self._calls = self._sum + probs.cpu(), self._calls + 1

    def entry(self) -> dict[str, Any]:
        """The patterns of the layer, and the frame that they are for."""
        mean = self._sum / (self._calls + 1e-10)
        frame = [self._grid.height, self._grid.width]
        heads = find_patterns(mean, self._params.threshold, self._params.share)
        return {"frame": frame, "heads": heads}


def select(q: Tensor, k: Tensor, grid: TokenGrid, params: SimpleNamespace, state: State) -> Tensor:
    """The map that the layer's patterns make on this grid."""
    heads = _read(state.table, grid, q.shape[1])
    return torch.stack([_map_of(grid, *head, q.device) for head in heads])[None]


def _read(
    table: Mapping[str, Any] | None, grid: TokenGrid, num_heads: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The diagonals and columns of every head.

    Raises:
        ValueError: The table is not one of dam's, or for other frames or heads.
    """
    try:
        assert table is not None
        frame, heads = tuple(table["frame"]), table["heads"]
        found = [(tuple(each["diagonals"]), tuple(each["columns"])) for each in heads]
        numbers = [n for head in found for kind in head for n in kind]
    except (AssertionError, KeyError, TypeError):
        found, frame, numbers = [], (), [None]
    if not all(type(n) is int and abs(n) < 2**31 for n in numbers):
        raise ValueError("the table is not one of dam's: nabla calibrate --method dam makes it.")
    if frame != (grid.height, grid.width) or len(found) != num_heads:
        raise ValueError(
            f"dam's table is for {len(found)} heads and frames of {'x'.join(map(str, frame))} "
            f"tokens, of any number: got {num_heads} heads and {grid.height}x{grid.width}. "
            "nabla calibrate --method dam makes another."
        )
    return found


@lru_cache(maxsize=256)
def _map_of(
    grid: TokenGrid, diagonals: tuple[int, ...], columns: tuple[int, ...], device: torch.device
) -> Tensor:
    """Blocks with a pair on a diagonal or in a column; the main diagonal always counts."""
    total = grid.num_tokens
    with torch.inference_mode(False), torch.no_grad():
        slots = block_order(TokenLayout(grid), torch.device("cpu")).to_raster
        block = slots // grid.block.tokens
        kept = torch.eye(grid.num_blocks, dtype=torch.bool)
        for offset in diagonals:
            if abs(offset) < total:
                count, key = total - abs(offset), max(0, offset)
                query = key - offset
                kept[block[query : query + count], block[key : key + count]] = True
        inside = torch.tensor([c for c in columns if 0 <= c < total], dtype=torch.long)
        kept[:, block[inside]] = True
        return kept.to(device)


METHOD = Method(
    select=select,
    name="dam",
    title="diagonals and columns that mean attention fills, at any length",
    parameters=(
        number("threshold", least=0, example=0.3),
        share("share", "pairs of a pattern that are high", default=0.8),
    ),
    kind="calibrated",
    exactness="reconstructed",
    ours="both directions, since a video has no first token; a block is kept where any pair is; "
    "every block keeps itself; attention is among the video's tokens; other numbers of frames "
    "continue the patterns, other heights and widths need a table of their own",
    paper="arXiv:2506.11104",
    code="HanzhiZhang-Ulrica/DAM@bc0c84c (patterns of a causal language model)",
    published="dam-0.3",
    needs=("table",),
    calibrate=_MeanAttention,
    packs=False,
)
