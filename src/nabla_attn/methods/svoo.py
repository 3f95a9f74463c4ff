"""SVOO: clusters of queries and of keys that look at each other, kept as SVG2's are."""

from types import SimpleNamespace

from torch import Tensor

from nabla_attn.core.clusters import cluster_both
from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.order import TokenLayout, to_raster
from nabla_attn.methods.contract import Method, Selection, State
from nabla_attn.methods.parameters import count, number, share
from nabla_attn.methods.svg2 import select_clusters


def select(
    q: Tensor, k: Tensor, grid: TokenGrid, params: SimpleNamespace, state: State
) -> Selection:
    """Keys with alike products with the query clusters are one cluster, and the other way round."""
    q_tokens, k_tokens = (to_raster(x, TokenLayout(grid)) for x in (q, k))
    num_q, num_k = (min(wanted, grid.num_tokens) for wanted in (params.queries, params.keys))
    sides = cluster_both(q_tokens, k_tokens, num_q, num_k, params.iterations)
    return select_clusters(*sides, grid, params, state)


METHOD = Method(
    select=select,
    name="svoo",
    title="clusters of queries and keys by their products, kept by their centroids' attention",
    parameters=(
        share("mass", "the probability of kept clusters", example=0.9),
        count("queries", default=256),
        count("keys", default=1024),
        number("floor", least=0, most=1, default=0.15),
        count("iterations", default=2),
    ),
    kind="pooled",
    exactness="reconstructed",
    ours="one floor for all heads, the least of the paper's, instead of one from a profile of each "
    "head; clusters begin with tokens at even distances instead of random ones, and fill up whole "
    "blocks of the grid",
    paper="arXiv:2603.18636",
    code="Mutual-Luo/SVOO@e4ae67b svoo/co_clustering.py:2402, 556",
    licence="Apache-2.0",
    published="svoo-0.9-256-1024-0.15-2",
    packs=False,
    takes_order=False,
)
