"""What each block truly holds, from all tokens in float64: what estimates are measured against.

Every query meets every key, some query blocks at a time, so memory is bounded and time is that of
dense attention in double precision.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from nabla_attn.shapes import Bool, Float, Int

PANEL_VALUES = 2**23
"""Numbers of the largest temporary, unless one query block has more: 64 MB."""

TAILS = (None, "mean", "first")


@torch.no_grad()
def exact_mass(
    q: Float[Tensor, "*heads slots dim"],
    k: Float[Tensor, "*heads slots dim"],
    counts: Int[Tensor, " blocks"],
    *,
    scale: float | None = None,
    allowed: Bool[Tensor, "blocks blocks"] | None = None,
) -> Float[Tensor, "*heads blocks blocks"]:
    """The probability that a query block's tokens give to each key block, their mean; float64.

    Args:
        q: Queries in block order, any floating dtype.
        k: Keys in block order; empty slots stand last in their block.
        counts: Tokens of every block.
        scale: Factor on q.k; None is 1/sqrt(dim).
        allowed: Pairs outside it hold nothing (packed clips).
    """
    # Values of no dimensions: what is summed is the weights alone.
    v = k[..., :0]
    out = _new_scores(k, counts)
    for head, block, sums in _query_blocks(q, k, v, counts, scale, allowed):
        out[head, block] = (sums.masses / sums.masses.sum(dim=-1, keepdim=True)).mean(dim=0)
    return out.view(*q.shape[:-2], *out.shape[1:])


@torch.no_grad()
def exact_residual(
    q: Float[Tensor, "*heads slots dim"],
    k: Float[Tensor, "*heads slots dim"],
    v: Float[Tensor, "*heads slots dim"],
    counts: Int[Tensor, " blocks"],
    *,
    tail: str | None = None,
    scale: float | None = None,
    allowed: Bool[Tensor, "blocks blocks"] | None = None,
) -> Float[Tensor, "*heads blocks blocks"]:
    """How far the outputs of a query block move when a key block is not kept; float64.

    Attention's output is N / Z, sums over blocks of N_j = sum of exp(s q·k_c) v_c and of Z_j, the
    same without values. What stands for a dropped block, nothing or its part of a tail, changes
    them by dN_j and dZ_j. The output then moves by the sum over dropped blocks of
    r_j = (dN_j - N/Z dZ_j) / Z, times a factor that the dropped blocks share. This is the mean of
    |r_j|² over a query block's tokens. Choosing the highest leaves out that residuals may cancel.

    Args:
        q: Queries in block order, any floating dtype.
        k: Keys in block order; empty slots are zero and stand last in their block.
        v: Values, like k.
        counts: Tokens of every block.
        tail: What stands for a dropped block, as in `core.tail`; None is nothing.
        scale: Factor s on q.k; None is 1/sqrt(dim).
        allowed: Pairs outside it hold nothing (packed clips).

    Raises:
        ValueError: The tail is unknown.
    """
    if tail not in TAILS:
        raise ValueError(f"unknown tail {tail!r}; expected one of {TAILS}.")
    out = _new_scores(k, counts)
    for head, block, sums in _query_blocks(q, k, v, counts, scale, allowed):
        out[head, block] = sums.residuals(tail).mean(dim=0)
    return out.view(*q.shape[:-2], *out.shape[1:])


@dataclass(frozen=True, eq=False)
class BlockSums:
    """What each key block adds to the attention of some queries of one head, float64.

    Everything is over the exponential of each query's highest score.

    Attributes:
        masses: Sums of exponentials.
        values: Sums of exponentials times values.
        summaries: What the mean key of each block would add in the place of `masses`.
        means: Mean values.
        rise: What the first order adds to all mean values, for each query.
    """

    masses: Float[Tensor, "queries blocks"]
    values: Float[Tensor, "queries blocks dim"]
    summaries: Float[Tensor, "queries blocks"]
    means: Float[Tensor, "blocks dim"]
    rise: Float[Tensor, "queries dim"]

    def estimates(self, tail: str | None) -> tuple[Tensor, Tensor]:
        """What stands for `masses` and `values` of dropped blocks."""
        if tail is None:
            return torch.zeros_like(self.masses), torch.zeros_like(self.values)
        values = self.means.expand_as(self.values)
        values = values if tail == "mean" else values + self.rise[:, None]
        return self.summaries, self.summaries[..., None] * values

    def attend(
        self, kept: Bool[Tensor, "queries blocks"], tail: str | None
    ) -> Float[Tensor, "queries dim"]:
        """The output over kept blocks, a tail standing for the others."""
        masses, values = self.estimates(tail)
        total = torch.where(kept, self.masses, masses).sum(dim=-1, keepdim=True)
        return torch.where(kept[..., None], self.values, values).sum(dim=1) / total

    def residuals(self, tail: str | None) -> Float[Tensor, "queries blocks"]:
        """The |r_j|² of `exact_residual` for every query."""
        masses, values = self.estimates(tail)
        total = self.masses.sum(dim=-1)[:, None, None]
        output = self.values.sum(dim=1, keepdim=True) / total
        moved = values - self.values - output * (masses - self.masses)[..., None]
        return (moved / total).square().sum(dim=-1)


def sum_blocks(
    q: Float[Tensor, "queries dim"],
    k: Float[Tensor, "slots dim"],
    v: Float[Tensor, "slots values"],
    counts: Int[Tensor, " blocks"],
    *,
    scale: float,
    allowed: Bool[Tensor, " blocks"] | None = None,
) -> BlockSums:
    """Exact attention of some queries of one head, summed over each key block.

    Args:
        q: The queries.
        k: Keys in block order, zero in empty slots.
        v: Values, like k.
        counts: Tokens of every block.
        scale: Factor on q.k.
        allowed: Key blocks that the queries may see; None is all.
    """
    block = len(k) // counts.numel()
    tokens = counts.double()
    query = q.double() * scale
    key, value = (x.double().unflatten(0, (-1, block)) for x in (k, v))
    hidden = torch.arange(block, device=k.device) >= counts[:, None]
    if allowed is not None:
        hidden = hidden | ~allowed[:, None]
    scores = (query @ key.flatten(0, 1).T).unflatten(-1, (-1, block))
    scores = scores.masked_fill_(hidden, float("-inf"))
    top = scores.flatten(1).amax(dim=-1)
    weights = scores.sub_(top[:, None, None]).exp_()
    means, mean_keys = (x.sum(dim=1) / tokens[:, None] for x in (value, key))
    summaries = (query @ mean_keys.T - top[:, None]).masked_fill(hidden[:, 0], float("-inf"))
    # Empty slots hold no key, so that what stands in their values does not count.
    seen = (~hidden[:, 0]).double()
    slope = torch.einsum("b,bcd,bce->de", seen, key, value - means[:, None])
    return BlockSums(
        masses=weights.sum(dim=-1),
        values=(weights.transpose(0, 1) @ value).transpose(0, 1),
        summaries=summaries.exp() * tokens,
        means=means,
        rise=query @ (slope / (seen @ tokens)),
    )


def _query_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    scale: float | None,
    allowed: Tensor | None,
) -> Iterator[tuple[int, int, BlockSums]]:
    """The sums of every head and query block."""
    scale = 1 / sqrt(q.shape[-1]) if scale is None else scale
    block = q.shape[-2] // counts.numel()
    # Those that see the same keys go together.
    step = max(1, PANEL_VALUES // (q.shape[-2] * max(block, v.shape[-1])))
    step = step if allowed is None else 1
    num_heads = k.shape[:-2].numel()
    heads = (x.reshape(num_heads, *x.shape[-2:]) for x in (q, k, v))
    for head, (query, key, value) in enumerate(zip(*heads, strict=True)):
        parts = [part[:n] for part, n in zip(query.split(block), counts.tolist(), strict=True)]
        for start in range(0, len(parts), step):
            some = parts[start : start + step]
            seen = None if allowed is None else allowed[start]
            sums = sum_blocks(torch.cat(some), key, value, counts, scale=scale, allowed=seen)
            lengths = [len(part) for part in some]
            for index, mine in enumerate(_split(sums, lengths)):
                yield head, start + index, mine


def _split(sums: BlockSums, lengths: list[int]) -> Iterator[BlockSums]:
    split = (x.split(lengths) for x in (sums.masses, sums.values, sums.summaries, sums.rise))
    for masses, values, summaries, rise in zip(*split, strict=True):
        yield BlockSums(masses, values, summaries, sums.means, rise)


def _new_scores(k: Tensor, counts: Tensor) -> Tensor:
    heads, blocks = k.shape[:-2].numel(), counts.numel()
    return k.new_empty((heads, blocks, blocks), dtype=torch.float64)
