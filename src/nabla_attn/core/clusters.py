"""k-means of the tokens of each head."""

import torch
from torch import Tensor

from nabla_attn.shapes import Float, Int

PANEL_VALUES = 2**25
"""Distances held at once: 128 MB in fp32."""

Clusters = tuple[Tensor, Tensor]
"""The cluster of every token [batch, heads, tokens] and centroids [batch, heads, clusters, dim]."""


def cluster_tokens(
    x: Float[Tensor, "batch heads tokens dim"],
    num_clusters: int,
    num_iterations: int,
    *,
    start: Float[Tensor, "batch heads clusters dim"] | None = None,
) -> tuple[Int[Tensor, "batch heads tokens"], Float[Tensor, "batch heads clusters dim"]]:
    """Assign tokens to the nearest centroid and move centroids to their tokens' mean, some times.

    A centroid without tokens stays where it is; of two that are equally near the first is taken.

    Args:
        x: Tokens; computed in fp32, or in fp64 where they come in it.
        num_clusters: Number of centroids.
        num_iterations: How often, at least once; ends early where no token changes its cluster.
        start: Centroids to begin with; None takes tokens at even distances.

    Returns:
        The cluster of every token, and the means of the clusters.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    centroids = _even(x, num_clusters) if start is None else start.to(x.dtype)
    labels = None
    with torch.autocast(x.device.type, enabled=False):
        for _ in range(num_iterations):
            found = _nearest(x, centroids)
            if labels is not None and torch.equal(found, labels):
                break
            labels, centroids = found, means_of_clusters(x, found, centroids)
    assert labels is not None
    return labels, centroids


def cluster_both(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch heads tokens dim"],
    num_q: int,
    num_k: int,
    num_iterations: int,
) -> tuple[Clusters, Clusters]:
    """Cluster keys by the direction of their products with query centroids, and queries likewise.

    Centroids begin with tokens at even distances and are means of their tokens; in an iteration
    keys go first. Arguments as for `cluster_tokens`; returns the clusters of q and of k.

    Source: SVOO (arXiv:2603.18636), Mutual-Luo/SVOO@e4ae67b svoo/co_clustering.py:2402.
    """
    q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
    q_centroids, k_centroids = _even(q, num_q), _even(k, num_k)
    with torch.autocast(q.device.type, enabled=False):
        for _ in range(num_iterations):
            k_labels = _alike(k, k_centroids, q_centroids)
            k_centroids = means_of_clusters(k, k_labels, k_centroids)
            q_labels = _alike(q, q_centroids, k_centroids)
            q_centroids = means_of_clusters(q, q_labels, q_centroids)
    return (q_labels, q_centroids), (k_labels, k_centroids)


def means_of_clusters(
    x: Float[Tensor, "batch heads tokens dim"],
    labels: Int[Tensor, "batch heads tokens"],
    otherwise: Float[Tensor, "batch heads clusters dim"],
) -> Float[Tensor, "batch heads clusters dim"]:
    """Means of the tokens of each cluster; `otherwise` where there are none."""
    sums = torch.zeros_like(otherwise).scatter_add_(2, labels[..., None].expand_as(x), x)
    counts = cluster_sizes(labels, otherwise.shape[2])[..., None]
    return torch.where(counts > 0, sums / counts.clamp_min(1), otherwise)


def cluster_sizes(
    labels: Int[Tensor, "batch heads tokens"], num_clusters: int
) -> Int[Tensor, "batch heads clusters"]:
    """Number of tokens of each cluster."""
    sizes = labels.new_zeros(*labels.shape[:2], num_clusters)
    return sizes.scatter_add_(2, labels, torch.ones_like(labels))


def _even(x: Tensor, count: int) -> Tensor:
    """Tokens at even distances."""
    return x[:, :, torch.linspace(0, x.shape[2] - 1, count, device=x.device).round().long()]


def _nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """The nearest centroid of every token."""
    lengths = centroids.square().sum(dim=-1)[..., None, :]
    found = [
        (lengths - 2 * (part @ centroids.transpose(-1, -2))).argmin(dim=-1)
        for part in _parts(x, centroids.shape[2])
    ]
    return torch.cat(found, dim=2)


def _alike(x: Tensor, centroids: Tensor, others: Tensor) -> Tensor:
    """The centroid whose products with `others` point most as those of each token do."""
    profiles = torch.nn.functional.normalize(centroids @ others.transpose(-1, -2), dim=-1, eps=1e-8)
    # The length of a token's own products changes nothing.
    found = [
        (part @ others.transpose(-1, -2) @ profiles.transpose(-1, -2)).argmax(dim=-1)
        for part in _parts(x, max(profiles.shape[2:]))
    ]
    return torch.cat(found, dim=2)


def _parts(x: Tensor, width: int) -> tuple[Tensor, ...]:
    """Some tokens at a time, so that rows of a width stay bounded."""
    return x.split(max(1, PANEL_VALUES // max(1, x.shape[0] * x.shape[1] * width)), dim=2)
