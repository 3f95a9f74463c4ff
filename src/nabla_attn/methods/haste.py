"""HASTE: kept mass of pooled blocks, looked for again only where means have moved."""

from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from nabla_attn.core.estimates import pool_panels
from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.scores import score_blocks
from nabla_attn.core.select import select_by_mass
from nabla_attn.methods.contract import Method, State
from nabla_attn.methods.parameters import number, share
from nabla_attn.methods.scored import by_heads


def select(q: Tensor, k: Tensor, grid: TokenGrid, params: SimpleNamespace, state: State) -> Tensor:
    """The map of an earlier step for heads whose means moved little since, else a new one."""
    means = (pool_panels(q, state.counts), pool_panels(k, state.counts))
    old = state.memory
    moved = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
    if "kept" in old and old["kept"].shape[:2] == q.shape[:2]:
        pairs = zip(means, old["means"], strict=True)
        drifts = [(new - before).abs().sum(dim=-1).mean(dim=-1) for new, before in pairs]
        moved = ~(drifts[0] + drifts[1] <= params.drift)
        if not moved.any():
            kept: Tensor = old["kept"]
            return kept
    kept = by_heads(partial(_by_mass, params.mass), *means, state)
    if not moved.all():
        kept = torch.where(moved[..., None, None], kept, old["kept"])
        new = zip(means, old["means"], strict=True)
        means = tuple(torch.where(moved[..., None, None], *pair) for pair in new)  # type: ignore
    old["kept"], old["means"] = kept, means
    return kept


def _by_mass(share: float, q_pooled: Tensor, k_pooled: Tensor, state: State) -> Tensor:
    probs = score_blocks(q_pooled, k_pooled, scale=state.scale, allowed=state.allowed)
    return select_by_mass(probs, share)


METHOD = Method(
    select=select,
    name="haste",
    title="kept mass of pooled blocks, reused until their means have drifted",
    parameters=(
        share("mass", "the kept probability mass", example=0.9),
        number("drift", least=0, default=30.0),
    ),
    kind="pooled",
    exactness="reconstructed",
    ours="drift is the mean over blocks of the sum over dimensions; one mass for all heads",
    paper="arXiv:2605.14513",
    published="haste-0.9-30",
    needs=("memory",),
)
