"""Sparse-vDiT: each head follows one of five patterns, found offline for every layer and step.

Full attention, none at all, a band frame by frame, a band patch by patch (diagonals of token pairs
that stand frames apart), or columns that all queries attend. A pattern is searched by the squared
error of its output plus a price for what it computes; where none is good enough a head stays full.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.head_orders import band_of_blocks, named_order, order_of_heads
from nabla_attn.core.order import TokenLayout, to_raster
from nabla_attn.core.select import count_of_share
from nabla_attn.methods.contract import Method, Selection, State, table_of_size
from nabla_attn.methods.parameters import number, share

MODES = ("full", "skip", "band", "frames", "columns")
PANEL_SCORES = 2**24
"""Scores held at once while patterns are searched: 64 MB."""


def _select(
    q: Tensor, k: Tensor, grid: TokenGrid, params: SimpleNamespace, state: State
) -> Selection:
    table = table_of_size("vdit", grid, state)
    steps = table["steps"]
    found = steps[len(steps) - 1 if state.step is None else min(state.step, len(steps) - 1)]
    heads = range(len(found)) if state.heads is None else state.heads
    modes = [found[head]["mode"] for head in heads]
    mask = torch.stack(
        [
            pattern(mode, grid, table["share"], found[head].get("columns", []), q.device)
            for head, mode in zip(heads, modes, strict=True)
        ]
    )
    names = ["hwt" if mode == "frames" else "raster" for mode in modes]
    order = order_of_heads(names, grid, q.device)
    is_kept = torch.tensor([mode != "skip" for mode in modes], device=q.device)

    def finish(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return out.masked_fill(~is_kept[:, None, None], 0)

    return Selection(
        mask[None], q_order=order, kv_order=order, finish=None if all(is_kept) else finish
    )


def pattern(
    mode: str, grid: TokenGrid, share: float, columns: list[int], device: torch.device
) -> Tensor:
    """The blocks that a mode keeps, in its order; what is skipped keeps the diagonal."""
    count = -(-grid.num_tokens // grid.block.tokens)
    if mode in ("band", "frames"):
        return band_of_blocks(grid.num_tokens, grid.block.tokens, share, device)
    if mode == "skip":
        return torch.eye(count, dtype=torch.bool, device=device)
    mask = torch.full((count, count), mode == "full", dtype=torch.bool, device=device)
    mask[:, columns] = True
    return mask


class Calibration:
    """Errors of the patterns for each step and head of one layer, over dense runs."""

    def __init__(self, params: SimpleNamespace, grid: TokenGrid) -> None:
        self.params, self.grid = params, grid
        self.errors: dict[int, Tensor] = {}
        self.masses: dict[int, Tensor] = {}
        self.counts: dict[int, int] = {}

    def observe(self, q: Tensor, k: Tensor, v: Tensor, state: State) -> None:
        """Try every pattern on one call."""
        step = state.step or 0
        q, k, v = (to_raster(x, TokenLayout(self.grid))[0] for x in (q, k, v))
        mass = column_masses(q * state.scale, k, self.grid.block.tokens)
        errors = errors_of_modes(
            q * state.scale, k, v, self.grid, self.params.share, self.columns(mass)
        )
        self.masses[step] = self.masses.get(step, 0) + mass
        self.errors[step] = self.errors.get(step, 0) + errors
        self.counts[step] = self.counts.get(step, 0) + 1

    def columns(self, mass: Tensor) -> Tensor:
        """The key blocks [heads, columns] with the most mass."""
        count = count_of_share(self.params.share, mass.shape[1])
        return mass.argsort(dim=1, descending=True, stable=True)[:, :count].sort(dim=1).values

    def entry(self) -> Any:
        """The pattern of every step and head."""
        prices = [1 - sparsity(mode, self.grid, self.params.share) for mode in MODES]
        steps = []
        for step in sorted(self.errors):
            losses = self.errors[step] / self.counts[step]
            losses = losses + self.params.price * losses.new_tensor(prices)
            columns = self.columns(self.masses[step]).tolist()
            modes = choose_modes(losses, self.params.worst)
            steps.append(
                [
                    {"mode": mode} | ({"columns": mine} if mode == "columns" else {})
                    for mode, mine in zip(modes, columns, strict=True)
                ]
            )
        sizes = [self.grid.frames, self.grid.height, self.grid.width]
        found = {"tokens": sizes, "block": self.grid.block.tokens, "share": self.params.share}
        return found | {"steps": steps}


def sparsity(mode: str, grid: TokenGrid, share: float) -> float:
    """What a mode leaves out: the share of pairs of blocks that it drops."""
    if mode == "skip":
        return 1.0
    count = -(-grid.num_tokens // grid.block.tokens)
    columns = list(range(count_of_share(share, count)))
    return 1 - pattern(mode, grid, share, columns, torch.device("cpu")).double().mean().item()


def choose_modes(losses: Tensor, worst: float) -> list[str]:
    """The mode of each head with the least loss [heads, modes]; full where all others are worse."""
    best = losses[:, 1:].argmin(dim=1) + 1
    is_good = losses[:, 1:].amin(dim=1) <= worst
    return [MODES[mode] if good else "full" for mode, good in zip(best, is_good, strict=True)]


def column_masses(q: Tensor, k: Tensor, block: int) -> Tensor:
    """The probability that all queries give each block of keys in raster order [heads, blocks]."""
    total = k.new_zeros(k.shape[:2])
    for rows in q.split(max(1, PANEL_SCORES // (len(k) * k.shape[1])), dim=1):
        total = total + (rows @ k.transpose(-1, -2)).softmax(dim=-1).sum(dim=1)
    missing = -k.shape[1] % block
    return torch.nn.functional.pad(total, (0, missing)).unflatten(1, (-1, block)).sum(dim=2)


def errors_of_modes(
    q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, share: float, columns: Tensor
) -> Tensor:
    """The mean squared error of each mode's output [heads, modes]; tokens in raster order."""
    block, heads = grid.block.tokens, len(q)
    kept, blocks = {}, {}
    for mode in ("band", "frames", "columns"):
        name = "hwt" if mode == "frames" else "raster"
        blocks[mode] = named_order(name, grid, q.device).slots[0, 0] // block
        lists = columns.tolist() if mode == "columns" else [[]]
        kept[mode] = torch.stack([pattern(mode, grid, share, x, q.device) for x in lists])
    sums = q.new_zeros(heads, len(MODES))
    step = max(1, PANEL_SCORES // (heads * k.shape[1]))
    for start in range(0, q.shape[1], step):
        rows = slice(start, start + step)
        probs = (q[:, rows] @ k.transpose(-1, -2)).softmax(dim=-1)
        exact = probs @ v
        sums[:, 1] += exact.square().sum(dim=(1, 2))
        for mode in kept:
            of_block = blocks[mode]
            part = probs * kept[mode][:, of_block[rows]][:, :, of_block]
            out = part @ v / part.sum(dim=-1, keepdim=True).clamp_min(1e-30)
            sums[:, MODES.index(mode)] += (out - exact).square().sum(dim=(1, 2))
    return sums / (q.shape[1] * v.shape[2])


METHOD = Method(
    name="vdit",
    title="one of five patterns for each layer, head and step, found offline",
    select=_select,
    calibrate=Calibration,
    parameters=(
        share("share", "kept pairs of a pattern / all pairs", example=0.3),
        number("price", least=0, default=0.5),
        number("worst", least=0, default=1.0),
    ),
    kind="calibrated",
    exactness="reconstructed",
    ours="widths: bands and columns have the share; columns are the key blocks with the most mass, "
    "and are searched with those of each call; sparsity is counted in blocks",
    paper="arXiv:2506.03065",
    published="vdit-0.3",
    needs=("step", "table"),
    keeps_constants=False,
    packs=False,
    takes_order=False,
)
