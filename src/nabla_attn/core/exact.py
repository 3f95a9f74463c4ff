"""What each block truly holds, from all tokens in float64: what estimates are measured against.

Every query meets every key, some query blocks at a time, so memory is bounded and time is that of
dense attention in double precision.
"""

from collections.abc import Iterator
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
    call = _Call(q, k, counts, scale, allowed)
    out = call.new_scores()
    for head, rows in call.panels(q.shape[-2]):
        weights, _ = call.weights(head, rows)
        mass = weights.sum(dim=-1)
        out[head, rows] = call.mean_of_tokens(mass / mass.sum(dim=-1, keepdim=True), rows)
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
    call = _Call(q, k, counts, scale, allowed)
    out, values = call.new_scores(), call.of_heads(v)
    for head, rows in call.panels(q.shape[-2] * v.shape[-1]):
        value = values[head].double()
        weights, top = call.weights(head, rows)
        mass, sums = weights.sum(dim=-1), torch.einsum("rkc,kcd->rkd", weights, value)
        total = mass.sum(dim=-1)[:, None, None]
        output = sums.sum(dim=1, keepdim=True) / total
        masses, estimates = _estimate(call, head, rows, value, top, tail)
        residual = (estimates - sums - output * (masses - mass)[..., None]) / total
        out[head, rows] = call.mean_of_tokens(residual.square().sum(dim=-1), rows)
    return out.view(*q.shape[:-2], *out.shape[1:])


def _estimate(
    call: "_Call", head: int, rows: slice, value: Tensor, top: Tensor, tail: str | None
) -> tuple[Tensor, Tensor]:
    """What stands for Z_j [tokens, blocks] and N_j [tokens, blocks, dim], over exp(top)."""
    if tail is None:
        return top.new_zeros(1), top.new_zeros(1)
    counts = call.counts.double()
    key, query = call.key(head), call.query(head, rows)
    mean_key, mean_value = (x.sum(dim=1) / counts[:, None] for x in (key, value))
    scores = (query @ mean_key.T - top).masked_fill(call.hidden(rows), float("-inf"))
    masses = scores.exp() * counts
    estimates = mean_value.expand(len(query), -1, -1)
    if tail == "first":
        # Empty slots hold no key, so that their offsets do not count.
        slopes = key.transpose(-1, -2) @ (value - mean_value[:, None])
        seen = torch.ones_like(slopes[:, 0, 0]).expand(rows.stop - rows.start, -1)
        seen = seen if call.allowed is None else call.allowed[rows].double()
        slopes = torch.einsum("ik,kde->ide", seen, slopes) / (seen @ counts)[:, None, None]
        rise = query.unflatten(0, (len(slopes), -1)) @ slopes
        estimates = estimates + rise.flatten(0, 1)[:, None]
    return masses, masses[..., None] * estimates


class _Call:
    """Queries and keys of one call; rows are all slots of some query blocks."""

    def __init__(
        self, q: Tensor, k: Tensor, counts: Tensor, scale: float | None, allowed: Tensor | None
    ) -> None:
        self.counts, self.allowed = counts, allowed
        self._block = q.shape[-2] // counts.numel()
        self._scale = 1 / sqrt(q.shape[-1]) if scale is None else scale
        self._queries, self._keys = self.of_heads(q), self.of_heads(k)
        self._is_token = torch.arange(self._block, device=counts.device) < counts[:, None]

    def of_heads(self, x: Tensor) -> Tensor:
        """[samples and heads, blocks, block_tokens, dim]."""
        return x.reshape(-1, self.counts.numel(), self._block, x.shape[-1])

    def new_scores(self) -> Tensor:
        heads, blocks = self._keys.shape[:2]
        return self._keys.new_empty((heads, blocks, blocks), dtype=torch.float64)

    def panels(self, cost: int) -> Iterator[tuple[int, slice]]:
        """Every head, and slices of its query blocks; `cost` is of one query token."""
        step, blocks = max(1, PANEL_VALUES // (cost * self._block)), self.counts.numel()
        for head in range(len(self._keys)):
            for row in range(0, blocks, step):
                yield head, slice(row, min(row + step, blocks))

    def key(self, head: int) -> Tensor:
        return self._keys[head].double()

    def query(self, head: int, rows: slice) -> Tensor:
        return self._queries[head, rows].double().flatten(0, 1) * self._scale

    def hidden(self, rows: slice) -> Tensor:
        """Key blocks that the rows' tokens may not see [tokens or 1, blocks]."""
        if self.allowed is None:
            return torch.zeros_like(self._is_token[None, :, 0])
        return ~self.allowed[rows].repeat_interleave(self._block, dim=0)

    def weights(self, head: int, rows: slice) -> tuple[Tensor, Tensor]:
        """Exponentials of scores over that of each row's highest [rows, blocks, block_tokens]."""
        scores = self.query(head, rows) @ self.key(head).flatten(0, 1).T
        scores = scores.unflatten(-1, (-1, self._block))
        scores = scores.masked_fill(self.hidden(rows)[..., None] | ~self._is_token, float("-inf"))
        top = scores.flatten(1).amax(dim=-1, keepdim=True)
        return (scores - top[..., None]).exp(), top

    def mean_of_tokens(self, x: Tensor, rows: slice) -> Tensor:
        """Means over each query block's own tokens: [rows, blocks] -> [query blocks, blocks]."""
        x = x.unflatten(0, (-1, self._block)) * self._is_token[rows, :, None]
        return x.sum(dim=1) / self.counts[rows, None]
