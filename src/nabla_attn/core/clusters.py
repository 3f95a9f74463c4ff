"""k-means of the tokens of each head."""

import torch
from torch import Tensor

from nabla_attn.shapes import Float, Int

PANEL_VALUES = 2**25
"""Distances held at once: 128 MB in fp32."""


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
    if start is None:
        first = torch.linspace(0, x.shape[2] - 1, num_clusters, device=x.device).round().long()
        start = x[:, :, first]
    centroids, labels = start.to(x.dtype), None
    with torch.autocast(x.device.type, enabled=False):
        for _ in range(num_iterations):
            found = _nearest(x, centroids)
            if labels is not None and torch.equal(found, labels):
                break
            labels, centroids = found, means_of_clusters(x, found, centroids)
    assert labels is not None
    return labels, centroids


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


def _nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """The nearest centroid of every token, some tokens at a time."""
    lengths = centroids.square().sum(dim=-1)[..., None, :]
    heads = max(1, x.shape[0] * x.shape[1])
    step = max(1, PANEL_VALUES // (heads * centroids.shape[2]))
    found = [
        (lengths - 2 * (part @ centroids.transpose(-1, -2))).argmin(dim=-1)
        for part in x.split(step, dim=2)
    ]
    return torch.cat(found, dim=2)
