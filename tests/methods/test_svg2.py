import math

import pytest
import torch
from tests.oracle import masked_attention, random_qkv

import nabla_attn as na
from nabla_attn.block_selection import select_blocks
from nabla_attn.core.clusters import cluster_tokens
from nabla_attn.core.order import TokenLayout, to_blocks

GRIDS = {
    "whole": na.TokenGrid(2, 8, 8, block=na.BlockShape(1, 4, 4)),
    "ragged": na.TokenGrid(3, 5, 7, block=na.BlockShape(1, 4, 4)),
    "one frame": na.TokenGrid(1, 9, 7, block=na.BlockShape(1, 3, 3)),
}


def kmeans(x, start, iterations):
    """Lloyd's algorithm, token by token; x is [tokens, dim]."""
    centroids = [c.clone() for c in start]
    for _ in range(iterations):
        labels = []
        for token in x:
            distances = [(token - c).square().sum().item() for c in centroids]
            labels.append(distances.index(min(distances)))
        for index in range(len(centroids)):
            members = [token for token, label in zip(x, labels, strict=True) if label == index]
            if members:
                centroids[index] = torch.stack(members).mean(dim=0)
    return torch.tensor(labels), torch.stack(centroids)


def even(x, count):
    return x[torch.linspace(0, len(x) - 1, count).round().long()]


def pairs(q, k, sides, mass, floor):
    """Who attends whom in one head, from the published rule."""
    (q_labels, q_centroids), (k_labels, k_centroids) = sides
    count = len(k_centroids)
    sizes = torch.bincount(k_labels, minlength=count).double()
    scores = q_centroids @ k_centroids.T / math.sqrt(q.shape[-1])
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for row, values in enumerate(scores):
        weights = sizes * (values - values.max()).exp()
        probs = (weights / weights.sum()).tolist()
        order = sorted(range(count), key=lambda j: (-probs[j], j))
        total = 0.0
        for rank, j in enumerate(order):
            kept[row, j] = rank == 0 or total <= mass or rank < int(floor * count)
            total += probs[j]
    return kept[q_labels][:, k_labels]


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("mass, floor", [(0.5, 0.1), (0.9, 0.0), (0.1, 0.5)])
def test_clusters_attend_as_published(name, mass, floor):
    grid = GRIDS[name]
    q, k, v = random_qkv(grid, batch=2, dtype=torch.float64)
    out = na.nabla_attention(q, k, v, grid, f"svg2-{mass}-5-9-{floor}-7")
    for sample, head in ((0, 0), (1, 1)):
        one = [x[sample, head] for x in (q, k, v)]
        sides = [kmeans(one[0], even(one[0], 5), 7), kmeans(one[1], even(one[1], 9), 7)]
        mask = pairs(*one[:2], sides, mass, floor)
        expected = masked_attention(*(x[None, None] for x in one), mask)[0, 0]
        torch.testing.assert_close(out[sample, head], expected, atol=1e-9, rtol=0)


def test_centroids_of_the_step_before_are_the_start():
    grid, memory = GRIDS["ragged"], {}
    layout, config = TokenLayout(grid), na.parse("svg2-0.5-5-9-0.1-7-2")
    maps, inputs = [], [random_qkv(grid, heads=1, dtype=torch.float64)[:2] for _ in range(2)]
    for q, k in inputs:
        blocks = (to_blocks(x, layout) for x in (q, k))
        maps.append(select_blocks(*blocks, layout, config, memory=memory))
    first, second = (inputs[index][0][0, 0] for index in (0, 1))
    _, centroids = kmeans(first, even(first, 5), 7)
    labels, _ = kmeans(second, centroids, 2)
    tokens = maps[1].q_order.tokens[0, 0]
    found = labels[tokens[tokens >= 0]]
    assert torch.equal(found, labels.sort().values)


def test_k_means_stops_and_keeps_centroids_without_tokens():
    x = torch.tensor([0.0, 0.1, 10.0, 10.1])[None, None, :, None].double()
    start = torch.tensor([0.0, 10.0, 99.0])[None, None, :, None].double()
    labels, centroids = cluster_tokens(x, 3, 100, start=start)
    assert labels.flatten().tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(centroids.flatten(), torch.tensor([0.05, 10.05, 99.0]).double())
    # Of two that are equally near the first is taken.
    tied, _ = cluster_tokens(torch.full_like(x, 5.0), 2, 1, start=start[:, :, :2])
    assert (tied == 0).all()


def test_full_mass_and_clusters_of_one_token_are_dense():
    grid = GRIDS["ragged"]
    q, k, v = random_qkv(grid, dtype=torch.float64)
    dense = na.nabla_attention(q, k, v, grid, "dense")
    for algorithm in ("svg2-1-5-9", "svg2-0.999999999999-300-1000-0-1"):
        out = na.nabla_attention(q, k, v, grid, algorithm)
        torch.testing.assert_close(out, dense, atol=1e-6, rtol=0)


def test_gradients_are_those_of_the_kept_pairs():
    grid = GRIDS["one frame"]
    inputs = [x.requires_grad_() for x in random_qkv(grid, heads=1, dtype=torch.float64)]
    na.nabla_attention(*inputs, grid, "svg2-0.5-5-9-0.1-7").square().sum().backward()
    one = [x.detach()[0, 0] for x in inputs]
    sides = [kmeans(one[0], even(one[0], 5), 7), kmeans(one[1], even(one[1], 9), 7)]
    exact = [x.detach().requires_grad_() for x in inputs]
    masked_attention(*exact, pairs(*one[:2], sides, 0.5, 0.1)).square().sum().backward()
    for x, y in zip(inputs, exact, strict=True):
        torch.testing.assert_close(x.grad, y.grad, atol=1e-9, rtol=0)


def co_clusters(q, k, num_q, num_k, iterations):
    """SVOO's clusters, token by token."""

    def assign(x, centroids, others):
        labels = []
        for token in x:
            alike = [torch.cosine_similarity(others @ token, others @ c, dim=0) for c in centroids]
            labels.append(max(range(len(alike)), key=lambda j: (alike[j].item(), -j)))
        means = [c.clone() for c in centroids]
        for index in range(len(means)):
            members = [t for t, label in zip(x, labels, strict=True) if label == index]
            if members:
                means[index] = torch.stack(members).mean(dim=0)
        return torch.tensor(labels), torch.stack(means)

    q_centroids, k_centroids = even(q, num_q), even(k, num_k)
    for _ in range(iterations):
        k_labels, k_centroids = assign(k, k_centroids, q_centroids)
        q_labels, q_centroids = assign(q, q_centroids, k_centroids)
    return (q_labels, q_centroids), (k_labels, k_centroids)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("mass, floor", [(0.5, 0.15), (0.1, 0.5)])
def test_clusters_that_look_at_each_other_attend_as_published(name, mass, floor):
    grid = GRIDS[name]
    q, k, v = random_qkv(grid, batch=2, dtype=torch.float64)
    out = na.nabla_attention(q, k, v, grid, f"svoo-{mass}-5-9-{floor}-2")
    for sample, head in ((0, 0), (1, 1)):
        one = [x[sample, head] for x in (q, k, v)]
        mask = pairs(*one[:2], co_clusters(*one[:2], 5, 9, 2), mass, floor)
        expected = masked_attention(*(x[None, None] for x in one), mask)[0, 0]
        torch.testing.assert_close(out[sample, head], expected, atol=1e-9, rtol=0)
    dense = na.nabla_attention(q, k, v, grid, "dense")
    torch.testing.assert_close(na.nabla_attention(q, k, v, grid, "svoo-1-5-9"), dense)
