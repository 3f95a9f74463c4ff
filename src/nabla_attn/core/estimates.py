"""How much each query block needs each key block, estimated from more than the product of means.

All take tokens in block order, empty slots zero and last in their block (see `order.to_blocks`),
and the number of tokens of every block. They compute in fp32, or in fp64 where it comes, autocast
or not, a few heads and query blocks at a time: memory beside the result is bounded.
"""

from collections.abc import Callable, Iterator
from math import sqrt

import torch
from torch import Tensor

from nabla_attn.core.scores import multiply_blocks, pool_blocks
from nabla_attn.shapes import Bool, Float, Int

PANEL_VALUES = 2**25
"""Numbers of the largest temporary: 128 MB in fp32."""


def score_first_order(
    q: Float[Tensor, "*heads slots dim"],
    k: Float[Tensor, "*heads slots dim"],
    v: Float[Tensor, "*heads slots dim"],
    counts: Int[Tensor, " blocks"],
    *,
    scale: float | None = None,
) -> Float[Tensor, "*heads blocks blocks"]:
    """The scaled product of means, plus the logarithm of what the first order of a block weighs.

    That is s q̄·k̄_j + log(|H_j| + 1e-5) with H_j = sum over c in j of (k_c - k̄_j) v_cᵀ and the norm
    that of its entries: a block counts for more where a mean says little about it.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        counts: Tokens of every block.
        scale: Factor s on q.k; None is 1/sqrt(dim).

    Source: PISA (arXiv:2602.01077), xie-lab-ml/piecewise-sparse-attention@8604494
    piecewise_attn/kernels/piecewise_sparse_attn_tma.py:144-318.
    """
    products = multiply_blocks(pool_panels(q, counts), pool_panels(k, counts), scale=scale)
    return products + (first_order_norms(k, v, counts) + 1e-5).log()[..., None, :]


def first_order_norms(
    k: Float[Tensor, "*heads slots dim"],
    v: Float[Tensor, "*heads slots dim"],
    counts: Int[Tensor, " blocks"],
) -> Float[Tensor, "*heads blocks"]:
    """The root of the sum of squares of the entries of every block's H_j; see `score_first_order`.

    Args:
        k: Keys.
        v: Values.
        counts: Tokens of every block.
    """
    num_blocks, dim = counts.numel(), k.shape[-1]
    keys, values, means = of_heads(k), of_heads(v), of_heads(pool_panels(k, counts))
    norms = means.new_empty(means.shape[:2])
    with torch.autocast(k.device.type, enabled=False):
        for head, some in _panels(len(keys), num_blocks, dim * dim):
            key, value = (_block(x[head], num_blocks, some, means.dtype) for x in (keys, values))
            # Empty slots hold no value, so that their keys do not count.
            slopes = (key - means[head, some, None]).transpose(-1, -2) @ value
            norms[head, some] = slopes.flatten(-2).norm(dim=-1)
    return norms.view(*k.shape[:-2], num_blocks)


def score_centroid_error(
    q: Float[Tensor, "*heads slots dim"],
    k: Float[Tensor, "*heads slots dim"],
    v: Float[Tensor, "*heads slots dim"],
    counts: Int[Tensor, " blocks"],
    *,
    scale: float | None = None,
) -> Float[Tensor, "*heads blocks blocks"]:
    """The logarithm of the squared error that a block's centroid makes for the mean query.

    That is log of the sum over c in j of |exp(s q̄·k_c) v_c - exp(s q̄·k̄_j) v̄_j|², minus infinity
    where a block is its centroid.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        counts: Tokens of every block.
        scale: Factor s on q.k; None is 1/sqrt(dim).

    Source: SVG-EAR (arXiv:2603.08982), Mutual-Luo/SVOO@e4ae67b svoo/co_clustering.py:1440-1692.
    """
    num_blocks, block = counts.numel(), k.shape[-2] // counts.numel()
    scale = 1 / sqrt(q.shape[-1]) if scale is None else scale
    queries, means = (of_heads(pool_panels(x, counts)) for x in (q, k))
    keys, values, centroids = of_heads(k), of_heads(v), of_heads(pool_panels(v, counts))
    is_empty = ~filled_slots(counts, block)

    def score(head: slice, rows: slice) -> Tensor:
        key, value = (_block(x[head], num_blocks, slice(None), means.dtype) for x in (keys, values))
        offsets = (value - centroids[head, :, None]).masked_fill(is_empty[..., None], 0)
        along = (offsets * centroids[head, :, None]).sum(dim=-1)
        length = centroids[head].square().sum(dim=-1)
        query = queries[head, rows] * scale
        at_mean = query @ means[head].transpose(-1, -2)
        # Deviations of a block's scores from that of its mean, which is not above their highest.
        deviations = (
            query @ (key - means[head, :, None]).flatten(1, 2).transpose(-1, -2)
        ).unflatten(-1, (num_blocks, block))
        deviations = deviations.masked_fill(is_empty, float("-inf"))
        top = deviations.amax(dim=-1, keepdim=True)
        weights = (deviations - top).exp()
        # Nothing cancels: v_c is its centroid and an offset, exp(x) - 1 of a small x is exact.
        centre = (-top).exp()
        small = deviations.clamp_max(1).expm1() * centre
        rises = torch.where(deviations < 1, small, weights - centre).masked_fill(is_empty, 0)
        error = length[:, None] * rises.square().sum(dim=-1)
        error = error + 2 * (rises * weights * along[:, None]).sum(dim=-1)
        error = error + (weights.square() * offsets.square().sum(dim=-1)[:, None]).sum(dim=-1)
        return error.clamp_min(0).log() + 2 * (at_mean + top.squeeze(-1))

    shape = (len(keys), num_blocks, num_blocks)
    return fill_scores(score, means, shape, 4 * keys.shape[1]).view(
        *k.shape[:-2], num_blocks, num_blocks
    )


def score_novelty(
    q: Float[Tensor, "*heads slots dim"],
    k: Float[Tensor, "*heads slots dim"],
    counts: Int[Tensor, " blocks"],
    *,
    weight: float = 0.7,
    allowed: Bool[Tensor, "blocks blocks"] | None = None,
) -> Float[Tensor, "*heads blocks blocks"]:
    """Likeness of a key block's mean to the query block's, less its likeness to other key blocks'.

    Likeness is the cosine brought into [0, 1]; the second is the mean over all other key blocks
    that may be seen together with it.

    Args:
        q: Queries.
        k: Keys.
        counts: Tokens of every block.
        weight: How much the first counts; the second counts for the rest.
        allowed: Pairs outside it become minus infinity, and do not count as others.

    Source: SSTA, Tencent-Hunyuan/HunyuanVideo-1.5@60783e7 modules/ssta_attention.py:90.
    """
    means = (pool_panels(x, counts) for x in (q, k))
    q_unit, k_unit = (torch.nn.functional.normalize(mean, dim=-1) for mean in means)
    importance = (multiply_blocks(q_unit, k_unit, scale=1.0) + 1) / 2
    likeness = (multiply_blocks(k_unit, k_unit, scale=1.0) + 1) / 2
    others = ~torch.eye(counts.numel(), dtype=torch.bool, device=q.device)
    others = others if allowed is None else others & allowed
    count = others.sum(dim=-1).clamp_min(1)
    redundancy = (likeness * others).sum(dim=-1) / count
    scores = weight * importance - (1 - weight) * redundancy[..., None, :]
    return scores if allowed is None else scores.masked_fill(~allowed, float("-inf"))


def self_similarity(
    x: Float[Tensor, "*heads slots dim"], counts: Int[Tensor, " blocks"]
) -> Float[Tensor, "*heads blocks"]:
    """The mean cosine of all pairs of a block's tokens, each with itself included.

    Args:
        x: Queries or keys; a token of zeros has a cosine of 0 to all.
        counts: Tokens of every block.

    Source: SpargeAttn (arXiv:2502.18137), thu-ml/SpargeAttn@bfd980b spas_sage_attn/utils.py.
    """
    # The mean of all products is the squared length of the mean.
    dtype = torch.promote_types(x.dtype, torch.float32)
    parts = [
        pool_blocks(torch.nn.functional.normalize(part.to(dtype), dim=-1), counts)
        for part in of_heads(x).split(max(1, PANEL_VALUES // (x.shape[-2] * x.shape[-1])))
    ]
    return torch.cat(parts).square().sum(dim=-1).view(*x.shape[:-2], counts.numel())


def pool_panels(
    x: Float[Tensor, "*heads slots dim"], counts: Int[Tensor, " blocks"]
) -> Float[Tensor, "*heads blocks dim"]:
    """`pool_blocks` of some heads at a time: a CPU copies what it sums into fp32."""
    parts = of_heads(x).split(max(1, PANEL_VALUES // (x.shape[-2] * x.shape[-1])))
    pooled = torch.cat([pool_blocks(part, counts) for part in parts])
    return pooled.view(*x.shape[:-2], counts.numel(), x.shape[-1])


def filled_slots(counts: Tensor, block: int) -> Tensor:
    """Which slots of every block hold a token [blocks, block_tokens]: the first ones."""
    return torch.arange(block, device=counts.device) < counts[:, None]


def of_heads(x: Tensor) -> Tensor:
    """One axis for all samples and heads."""
    return x.reshape(-1, *x.shape[-2:])


def _block(x: Tensor, num_blocks: int, some: slice, dtype: torch.dtype) -> Tensor:
    """Tokens of some blocks [heads, blocks, block_tokens, dim]."""
    return x.unflatten(-2, (num_blocks, -1))[:, some].to(dtype)


def fill_scores(
    score: Callable[[slice, slice], Tensor], like: Tensor, shape: tuple[int, ...], cost: int
) -> Tensor:
    """Scores of all heads and query blocks, some at a time; `cost` is of one query block."""
    out = like.new_empty(shape)
    with torch.autocast(like.device.type, enabled=False):
        for head, rows in _panels(shape[0], shape[1], cost):
            out[head, rows] = score(head, rows)
    return out


def _panels(num_heads: int, num_rows: int, cost: int) -> Iterator[tuple[slice, slice]]:
    """Slices of heads and rows of at most `PANEL_VALUES`, whole heads where they fit."""
    rows = max(1, min(num_rows, PANEL_VALUES // cost))
    heads = max(1, PANEL_VALUES // (cost * num_rows))
    for head in range(0, num_heads, heads):
        for row in range(0, num_rows, rows):
            stop = min(row + rows, num_rows)
            yield slice(head, min(head + heads, num_heads)), slice(row, stop)
