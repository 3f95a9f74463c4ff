"""Attention calls that methods are measured on, and where they come from.

Exact attention is computed a panel of rows at a time, so that memory beside the tokens is bounded.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from nabla_attn.attention import attend
from nabla_attn.config import SparseConfig, parse
from nabla_attn.core.block_map import BlockMap
from nabla_attn.core.order import TokenLayout, block_order, to_blocks
from nabla_attn.methods import Moment
from nabla_attn.methods.calibration import TableMaker

DENSE = parse("dense")
# Query tokens of which the kept probability is measured; all where there are fewer.
MASS_ROWS = 2048
# Probabilities held at once: 64 MB in fp32.
PANEL_VALUES = 2**24


@dataclass(frozen=True, eq=False)
class Call:
    """One attention call of a dense run: fp32 [1, heads, tokens, dim] in raster order.

    Attributes:
        q: Queries.
        k: Keys.
        v: Values.
        layout: Where the video's tokens and the text's are.
        moment: Step and layer.
        scale: Factor on q.k; None is 1/sqrt(dim).
        text_valid: False where text is padding; None is no padding.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    layout: TokenLayout
    moment: Moment
    scale: float | None = None
    text_valid: Tensor | None = None

    @property
    def factor(self) -> float:
        """The factor on q.k, as a number."""
        return self.q.shape[-1] ** -0.5 if self.scale is None else self.scale

    def laid_out(self, config: SparseConfig) -> TokenLayout:
        """The layout in the blocks of an algorithm."""
        return replace(self.layout, grid=self.layout.grid.with_block(config.block, config.order))

    def video(self, out: Tensor) -> Tensor:
        """The video's tokens of an output [1, heads, tokens, dim], as [heads, tokens * dim]."""
        start = self.layout.text_before
        return out[0, :, start : start + self.layout.grid.num_tokens].flatten(1)

    @cached_property
    def dense(self) -> Tensor:
        """Dense attention's output over the video's tokens, [heads, tokens * dim]."""
        options: dict[str, Any] = {"scale": self.scale, "text_valid": self.text_valid}
        with torch.no_grad():
            return self.video(attend(self.q, self.k, self.v, self.layout, DENSE, **options)[0])

    @cached_property
    def rows(self) -> Tensor:
        """The query tokens of which kept probability is measured, drawn once for every method."""
        drawn = torch.randperm(
            self.layout.grid.num_tokens, generator=torch.Generator().manual_seed(0)
        )
        return drawn[:MASS_ROWS].sort().values + self.layout.text_before

    def panels(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Head, query tokens, and their exact attention [tokens, tokens], panel by panel."""
        for head, (q, k) in enumerate(zip(self.q[0], self.k[0], strict=True)):
            for rows in self.rows.split(max(1, PANEL_VALUES // len(k))):
                scores = (q[rows] * self.factor) @ k.T
                if self._hidden is not None:
                    scores[:, self._hidden] = float("-inf")
                yield head, rows, scores.softmax(dim=-1)

    @cached_property
    def _hidden(self) -> Tensor | None:
        """Tokens that are padded text."""
        if self.text_valid is None:
            return None
        before = self.layout.text_before
        hidden = torch.zeros(self.layout.num_tokens, dtype=torch.bool)
        hidden[:before] = ~self.text_valid[0, :before]
        hidden[before + self.layout.grid.num_tokens :] = ~self.text_valid[0, before:]
        return hidden

    def block_mass(self, layout: TokenLayout) -> Tensor:
        """Probability of pairs of blocks, summed over the measured rows: [heads, blocks, blocks].

        Args:
            layout: This call's, in some blocks.
        """
        if layout not in self._masses:
            size, count = layout.grid.block.tokens, layout.num_blocks
            block = block_order(layout, self.q.device).to_raster // size
            square = torch.zeros(self.q.shape[1], count, count)
            for head, rows, probs in self.panels():
                sums = to_blocks(probs, layout, dim=1).unflatten(1, (count, size)).sum(dim=2)
                square[head].index_add_(0, block[rows], sums)
            self._masses[layout] = square
        return self._masses[layout]

    @cached_property
    def _masses(self) -> dict[TokenLayout, Tensor]:
        return {}

    def mass_of(self, block_map: BlockMap, layout: TokenLayout) -> Tensor:
        """Exact probability inside the kept blocks of every head, mean over the measured rows."""
        total = len(self.rows)
        if block_map.q_order is None or block_map.kv_order is None:
            return (self.block_mass(layout) * block_map.mask[0]).sum(dim=(1, 2)) / total
        heads, size = self.q.shape[1], block_map.block_tokens
        slots = block_map.q_order.slots[0].expand(heads, -1)
        tokens = block_map.kv_order.tokens[0].expand(heads, -1)
        column = torch.arange(tokens.shape[1]) // size
        sums = torch.zeros(heads)
        for head, rows, probs in self.panels():
            # A token may stand in several slots, of which a row sees one.
            kept = block_map.mask[0, head][slots[head][rows] // size][:, column]
            kept &= tokens[head] >= 0
            sums[head] += (probs[:, tokens[head].clamp_min(0)] * kept).sum()
        return sums / total


Series = list[Call]
"""The calls of one layer and guidance branch, in the order of steps."""

Tables = Mapping[str, Mapping[int, Any]]
"""The name of a method -> layer -> the entry that calibration made."""


class CallSource(Protocol):
    """Where the calls come from that methods are measured on."""

    @property
    def device(self) -> str:
        """The machine's name."""

    @property
    def seed(self) -> int:
        """The seed of everything random."""

    @property
    def head_names(self) -> Sequence[str]:
        """Names of the heads, where each has a kind of its own; or none."""

    @property
    def knob_prompts(self) -> int:
        """Prompts, from the first, on whose calls the knobs of methods are set."""

    def describe(self, number: int) -> dict[str, Any]:
        """The settings of a prompt's calls, as its record holds them."""

    def collect(self, number: int) -> list[Series]:
        """The calls of a prompt, by its number."""

    def make_tables(self, config: SparseConfig) -> Tables:
        """The table of an algorithm's method that needs one, from calls that are not measured."""


def add_call(maker: TableMaker, call: Call, config: SparseConfig) -> None:
    """Show a call to what makes the table of an algorithm."""
    layout = call.laid_out(config)
    q, k, v = (to_blocks(x, layout) for x in (call.q, call.k, call.v))
    maker.add(q, k, v, layout, call.moment, call.factor)
