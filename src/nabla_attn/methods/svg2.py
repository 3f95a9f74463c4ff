"""SVG2: k-means clusters of queries and of keys; each query cluster attends the best key clusters.

A query cluster keeps the key clusters, by the attention of their centroids weighted with how many
keys they have, until their probability exceeds a threshold.
"""

from types import SimpleNamespace

from torch import Tensor

from nabla_attn.core.clusters import Clusters, cluster_sizes, cluster_tokens
from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.head_orders import grouped_order, mask_of_groups
from nabla_attn.core.order import TokenLayout, to_raster
from nabla_attn.core.scores import multiply_blocks
from nabla_attn.core.select import select_past_mass
from nabla_attn.methods.contract import Method, Selection, State
from nabla_attn.methods.parameters import count, number, share


def _select(
    q: Tensor, k: Tensor, grid: TokenGrid, params: SimpleNamespace, state: State
) -> Selection:
    sides = []
    for name, x, wanted in (("q", q, params.queries), ("k", k, params.keys)):
        tokens, num_clusters = to_raster(x, TokenLayout(grid)), min(wanted, grid.num_tokens)
        start = state.memory.get(name)
        iterations = params.first if start is None else params.later
        labels, centroids = cluster_tokens(tokens, num_clusters, iterations, start=start)
        state.memory[name] = centroids
        sides.append((labels, centroids))
    return select_clusters(sides[0], sides[1], grid, params, state)


def select_clusters(
    q_clusters: Clusters,
    k_clusters: Clusters,
    grid: TokenGrid,
    params: SimpleNamespace,
    state: State,
) -> Selection:
    """Query clusters attend key clusters by the attention of their centroids."""
    (_, q_centroids), (k_labels, k_centroids) = q_clusters, k_clusters
    sizes = cluster_sizes(k_labels, k_centroids.shape[2]).to(k_centroids.dtype)
    scores = multiply_blocks(q_centroids, k_centroids, scale=state.scale)
    # No key, no probability: the logarithm of 0.
    probs = (scores + sizes.log()[..., None, :]).softmax(dim=-1)
    least = max(1, int(params.floor * k_centroids.shape[2]))
    kept = select_past_mass(probs, params.mass, num_least=least)
    orders, groups = [], []
    for labels, centroids in (q_clusters, k_clusters):
        order, of_block = grouped_order(labels, centroids.shape[2], grid.block.tokens)
        orders.append(order)
        groups.append(of_block)
    return Selection(mask_of_groups(kept, *groups), q_order=orders[0], kv_order=orders[1])


METHOD = Method(
    name="svg2",
    title="k-means clusters of queries and keys, kept by their centroids' attention",
    select=_select,
    parameters=(
        share("mass", "the probability of kept clusters", example=0.9),
        count("queries", default=300),
        count("keys", default=1000),
        number("floor", least=0, most=1, default=0.1),
        count("first", default=50),
        count("later", default=2),
    ),
    kind="pooled",
    exactness="reconstructed",
    ours="k-means begins with tokens at even distances instead of random ones, and ends where "
    "nothing changes; each cluster fills up whole blocks of the grid, which costs time and changes "
    "nothing",
    paper="arXiv:2505.18875",
    code="svg-project/Sparse-VideoGen@5ce7b01 svg/kmeans_utils.py:685-899, "
    "svg/models/wan/attention.py",
    licence="Apache-2.0",
    published="svg2-0.9-300-1000-0.1-50-2",
    needs=("memory",),
    packs=False,
    takes_order=False,
)
