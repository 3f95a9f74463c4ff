"""Methods that score blocks in their own way, against their formulas over lists of tokens."""

import math

import pytest
import torch
from tests.oracle import BLOCK_GRIDS, Blocks

import nabla_attn as na
from nabla_attn import methods

INF = float("inf")


def highest(scores, number):
    """The `number` highest of a dict, ties to the lower key."""
    return set(sorted(scores, key=lambda j: (-scores[j], j))[:number])


def softmax(scores):
    top = max(scores.values())
    weights = {j: math.exp(score - top) for j, score in scores.items()}
    total = math.fsum(weights.values())
    return {j: weight / total for j, weight in weights.items()}


def by_mass(probs, mass, *, inside=True):
    """The highest that hold a mass, the crossing one inside or out; at least one."""
    held, kept = 0.0, set()
    for j in sorted(probs, key=lambda j: (-probs[j], j)):
        if held + (0 if inside else probs[j]) >= mass and kept:
            break
        kept.add(j)
        held += probs[j]
    return kept


def cosine(a, b):
    return float(a @ b / a.norm() / b.norm())


class Row:
    """One query block of one head: its tokens, and those of the key blocks that it may see."""

    def __init__(self, x, i, queries, keys, values):
        self.q, self.scale = queries[i], x.scale
        self.seen = [j for j in range(len(keys)) if x.sees(i, j)]
        self.k = {j: keys[j] for j in self.seen}
        self.v = {j: values[j] for j in self.seen}
        self.all_keys = keys

    @property
    def products(self):
        return {j: float(self.q.mean(0) @ k.mean(0)) * self.scale for j, k in self.k.items()}

    def count(self, share):
        return max(1, int(share * len(self.seen)))


def sol(row, deviations, variance):
    scores = row.products
    mean = math.fsum(scores.values()) / len(scores)
    if variance == "exact":
        spread = math.fsum((score - mean) ** 2 for score in scores.values()) / len(scores)
    else:
        means = torch.stack([k.mean(0) for k in row.k.values()])
        spread = float((row.q.mean(0) * row.scale).square() @ means.var(0, correction=0))
    limit = mean + deviations * math.sqrt(spread + 1e-6 * math.log(2) ** 2)
    return {j for j in scores if scores[j] > limit} | highest(scores, 1)


def pisa(row, share):
    scores = {}
    for j, product in row.products.items():
        slope = (row.k[j] - row.k[j].mean(0)).T @ row.v[j]
        scores[j] = product + math.log(float(slope.square().sum().sqrt()) + 1e-5)
    return highest(scores, row.count(share))


def ear(row, mass):
    weighted = {j: product + math.log(len(row.k[j])) for j, product in row.products.items()}
    budget = sum(len(row.k[j]) for j in by_mass(softmax(weighted), mass))
    gains, query = {}, row.q.mean(0) * row.scale
    for j, k in row.k.items():
        centroid = (query @ k.mean(0)).exp() * row.v[j].mean(0)
        error = ((k @ query).exp()[:, None] * row.v[j] - centroid).square().sum()
        gains[j] = math.log(max(float(error), 1e-8)) - math.log(len(row.q) * len(k))
    kept, area = set(), 0
    for j in sorted(gains, key=lambda j: (-gains[j], j)):
        if area >= budget:
            break
        kept.add(j)
        area += len(row.k[j])
    return kept


def cells(tokens, size):
    return torch.stack([part.mean(0) for part in tokens.split(size)])


def subblock(row, share, cell, multiple):
    query = cells(row.q, cell) * row.scale
    scores = {j: float((query @ cells(k, cell).T).flatten().logsumexp(0)) for j, k in row.k.items()}
    number = math.ceil(math.ceil(share * len(scores) - 1e-9) / multiple) * multiple
    return highest(scores, number)


def dfs(row, share, cell):
    scores = dict.fromkeys(row.seen, 0.0)
    for query in cells(row.q, cell) * row.scale:
        sums = {j: float((cells(k, cell) @ query).exp().sum()) for j, k in row.k.items()}
        for j in scores:
            scores[j] += sums[j] / sum(sums.values())
    return highest(scores, row.count(share))


def xattn(row, mass, stride):
    probs = dict.fromkeys(row.seen, 0.0)
    parts = row.q.split(stride)
    for part in parts:
        sums = dict.fromkeys(row.seen, 0.0)
        for j, k in row.k.items():
            for key in k.split(stride):
                pairs = [
                    float(part[stride - 1 - s] @ key[s])
                    for s in range(len(key))
                    if stride - 1 - s < len(part)
                ]
                sums[j] += math.exp(sum(pairs) * row.scale / stride)
        for j in probs:
            probs[j] += sums[j] / sum(sums.values()) / len(parts)
    return by_mass(probs, mass) | {min(row.seen)}


def sparge(row, amount, similarity, rule):
    mean = torch.cat(row.all_keys).mean(0)

    def is_unlike(tokens):
        pairs = [cosine(a, b) for a in tokens for b in tokens]
        return sum(pairs) / len(pairs) <= similarity

    if is_unlike(row.q):
        return set(row.seen)
    unlike = {j for j, k in row.k.items() if is_unlike(k - mean)}
    scores = {j: -INF if j in unlike else score for j, score in row.products.items()}
    if len(unlike) == len(scores):
        return unlike
    probs = softmax(scores)
    if rule == "mass":
        return by_mass(probs, amount, inside=False) | unlike
    return highest(probs, row.count(amount)) | unlike


def ssta(row, blocks, weight):
    def likeness(a, b):
        return (cosine(a.mean(0), b.mean(0)) + 1) / 2

    scores = {}
    for j, k in row.k.items():
        others = [likeness(k, other) for o, other in row.k.items() if o != j]
        redundancy = sum(others) / max(1, len(others))
        scores[j] = weight * likeness(row.q, k) - (1 - weight) * redundancy
    return highest(scores, blocks)


def longcat(row, share, mass):
    kept = highest(row.products, row.count(share))
    more = by_mass(softmax(row.products), mass, inside=False) if mass else set()
    return max(kept, more, key=len)


def vsa(row, share):
    return highest(row.products, max(1, math.ceil(share * len(row.seen) - 1e-9)))


def sla(row, share):
    return highest(row.products, row.count(share))


def losa(row, mass):
    sums = dict.fromkeys(row.seen, 0.0)
    for query in row.q * row.scale:
        total = sum(float((k @ query).exp().sum()) for k in row.k.values())
        for j, k in row.k.items():
            sums[j] += float((k @ query).exp().sum()) / total / len(row.q)
    return by_mass(sums, mass)


def haste(row, mass):
    return by_mass(softmax(row.products), mass)


CASES = {
    "sol-0.7": (sol, 0.7, "diag"),
    "sol--0.3": (sol, -0.3, "diag"),
    "sol-0.5-exact": (sol, 0.5, "exact"),
    "pisa-0.4": (pisa, 0.4),
    "ear-0.5": (ear, 0.5),
    "subblock-0.3-4-2": (subblock, 0.3, 4, 2),
    "subblock-0.3-4-1": (subblock, 0.3, 4, 1),
    "dfs-0.4-4": (dfs, 0.4, 4),
    "xattn-0.6-4": (xattn, 0.6, 4),
    "sparge-0.5": (sparge, 0.5, -0.1, "share"),
    "sparge-0.4-0.3": (sparge, 0.4, 0.3, "share"),
    "sparge-0.7-0.2-mass": (sparge, 0.7, 0.2, "mass"),
    "ssta-3": (ssta, 3, 0.7),
    "ssta-2-0.2": (ssta, 2, 0.2),
    "longcat-0.3": (longcat, 0.3, 0),
    "longcat-0.2-0.8": (longcat, 0.2, 0.8),
    "vsa-0.3": (vsa, 0.3),
    "sla-0.4": (sla, 0.4),
    "losa-0.7": (losa, 0.7),
    "haste-0.7": (haste, 0.7),
}


@pytest.mark.parametrize("name", BLOCK_GRIDS)
@pytest.mark.parametrize("algorithm", CASES)
def test_methods_keep_what_their_formula_says(algorithm, name):
    grid = BLOCK_GRIDS[name]
    if grid.segments and not methods.find(algorithm.partition("-")[0]).packs:
        pytest.skip("takes one clip")
    formula, *values = CASES[algorithm]
    x = Blocks(grid)

    def row(i, queries, keys, tokens):
        kept = formula(Row(x, i, queries, keys, tokens), *values)
        return torch.tensor([float(j in kept) for j in range(len(keys))])

    expected = x.by_rows(row, x.q, x.k, x.v)
    tokens = [na.to_raster(y, grid) for y in (x.q, x.k, x.v)]
    mask = na.build_block_map(*tokens[:2], grid, algorithm, v=tokens[2]).mask
    assert torch.equal(mask, expected > 0)
    assert not expected.bool().all()


@pytest.mark.parametrize(
    ("algorithm", "number"),
    [
        *(("pisa-0.4", 3), ("subblock-0.3-4-2", 4), ("dfs-0.4-4", 3), ("sparge-0.5", 4)),
        *(("ssta-3", 3), ("longcat-0.3", 2), ("vsa-0.3", 3), ("sla-0.4", 3), ("draft-0.3", 8)),
        *(("sol-1", 1), ("cube-0.4", 3)),
    ],
)
def test_ties_go_to_the_lower_index(algorithm, number):
    grid = BLOCK_GRIDS["exact"]
    ones = torch.ones(1, 2, grid.num_tokens, 4, dtype=torch.float64)
    mask = na.build_block_map(ones, ones, grid, algorithm, v=ones).mask
    assert mask[..., :number].all() and not mask[..., number:].any()


@pytest.mark.parametrize("share", [0.1, 0.25, 0.6])
@pytest.mark.parametrize("name", ["exact", "ragged"])
def test_draft_keeps_the_highest_pairs_of_a_head(share, name):
    grid = BLOCK_GRIDS[name]
    x = Blocks(grid)

    def row(i, queries, keys):
        scores = {j: float(queries[i].mean(0) @ k.mean(0)) * x.scale for j, k in enumerate(keys)}
        return torch.tensor(list(softmax(scores).values()), dtype=torch.float64)

    probs = x.by_rows(row, x.q, x.k)
    mask = na.build_block_map(
        *(na.to_raster(y, grid) for y in (x.q, x.k)), grid, f"draft-{share}"
    ).mask
    for scores, kept in zip(probs.flatten(0, 1), mask.flatten(0, 1), strict=True):
        ordered = sorted(scores.flatten().tolist())
        expected = scores >= ordered[int((1 - share) * len(ordered))]
        best = torch.zeros_like(expected).scatter_(-1, scores.argmax(-1, keepdim=True), True)
        assert torch.equal(kept, expected | best)


@pytest.mark.parametrize("tail", ["", "_tail-mean"])
def test_limits_of_sol(tail):
    """Far below the mean everything is kept, far above it the best block alone."""
    grid = BLOCK_GRIDS["ragged"]
    x = Blocks(grid)
    q, k, v = (na.to_raster(y, grid) for y in (x.q, x.k, x.v))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(na.nabla_attention(q, k, v, grid, f"sol--100000{tail}"), dense)
    assert (na.build_block_map(q, k, grid, "sol-100000").mask.sum(-1) == 1).all()


def test_sparge_keeps_plain_mass_where_all_blocks_are_alike():
    grid = BLOCK_GRIDS["exact"]
    x = Blocks(grid)
    q, k = (na.to_raster(y, grid) for y in (x.q, x.k))
    mask = na.build_block_map(q, k, grid, "sparge-0.6--1-mass").mask
    probs = (
        (na.to_blocks(q, grid).unflatten(2, (-1, 16)).mean(3) * x.scale)
        @ na.to_blocks(k, grid).unflatten(2, (-1, 16)).mean(3).mT
    ).softmax(-1)
    ordered, index = probs.sort(dim=-1, descending=True, stable=True)
    number = (ordered.cumsum(-1) <= 0.6).sum(-1, keepdim=True).clamp_min(1)
    expected = torch.zeros_like(mask).scatter_(-1, index, torch.arange(8) < number)
    assert torch.equal(mask, expected)
    assert na.build_block_map(q, k, grid, "sparge-0.6-1").mask.all()


def test_a_union_covers_uniform_rows_and_rows_with_a_sink():
    """A share alone keeps too little of the first, a mass alone too little of the second."""
    grid = na.TokenGrid(1, 20, 20, block=na.BlockShape(1, 2, 2))
    q, k = torch.zeros(1, 1, 400, 8), torch.randn(1, 1, 400, 8)
    k[..., 0] = 0
    k[:, :, [0, 1, 20, 21], 0] = 1
    q[:, :, 200:, 0] = 100
    config = na.parse("nabla-0.2_topk-0.03")
    assert config == na.parse("topk-0.03_nabla-0.2") and str(na.parse(str(config))) == str(config)
    counts = {
        text: na.build_block_map(q, k, grid, text).mask[0, 0].sum(-1)
        for text in ("topk-0.03", "nabla-0.2", "topk-0.03_nabla-0.2")
    }
    uniform, sink = slice(0, 50), slice(50, 100)
    assert (counts["topk-0.03"] == 3).all()
    assert (counts["nabla-0.2"][uniform] == 20).all() and (counts["nabla-0.2"][sink] == 1).all()
    assert (counts["topk-0.03_nabla-0.2"][uniform] == 20).all()
    assert (counts["topk-0.03_nabla-0.2"][sink] == 3).all()
    whole = na.nabla_attention(q, k, k, grid, "topk-0.03_nabla-0.2_tail-first")
    assert whole.isfinite().all()
