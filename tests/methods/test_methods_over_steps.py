"""Methods that depend on the step or remember earlier ones, and those that change the output."""

import math

import pytest
import torch
from tests.oracle import BLOCK_GRIDS, Blocks

import nabla_attn as na
from nabla_attn.block_selection import select_blocks
from nabla_attn.core.order import TokenLayout
from nabla_attn.methods import Moment
from nabla_attn.methods.cube import share_of_step

GRIDS = {name: BLOCK_GRIDS[name] for name in ("exact", "ragged", "clips")}


class Run:
    """Calls of one layer in the steps of one generation."""

    def __init__(self, grid, algorithm, *, num_steps=8, tables=None):
        self.layout, self.config = TokenLayout(grid), na.parse(algorithm)
        self.num_steps, self.memory, self.tables = num_steps, {}, tables

    def step(self, number, x):
        moment = Moment(step=number, num_steps=self.num_steps)
        return select_blocks(
            x.q, x.k, self.layout, self.config, moment=moment, memory=self.memory, v=x.v
        ).mask


def mass_map(x, mass):
    """Blocks by exact mass in float64."""
    slots = torch.arange(x.q.shape[2])
    valid = slots % x.size < x.counts[slots // x.size]
    sees = torch.ones(len(x.counts), len(x.counts)).bool() if x.allowed is None else x.allowed
    scores = x.q @ x.k.mT * x.scale
    allowed = sees.repeat_interleave(x.size, 0).repeat_interleave(x.size, 1) & valid
    probs = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    blocks = probs.unflatten(-1, (-1, x.size)).sum(-1)[..., valid, :]
    row = (slots // x.size)[valid]
    means = torch.stack([blocks[..., row == i, :].mean(2) for i in range(len(x.counts))], dim=2)
    ordered, index = means.sort(dim=-1, descending=True, stable=True)
    keep = ordered.cumsum(-1) - ordered < mass
    return torch.zeros_like(keep).scatter_(-1, index, keep) & sees


@pytest.mark.parametrize("name", GRIDS)
def test_losa_freezes_the_map_of_one_step(name):
    grid = GRIDS[name]
    run, first, later = Run(grid, "losa-0.7-2"), Blocks(grid), Blocks(grid)
    everything = torch.ones(len(first.counts), len(first.counts)).bool()
    everything = everything if first.allowed is None else first.allowed
    for step in range(3):
        assert (run.step(step, first) == everything).all()
    assert torch.equal(run.step(3, later), mass_map(first, 0.7))
    assert torch.equal(run.step(7, later), mass_map(first, 0.7))
    # A run that begins late looks at the step that it has.
    assert torch.equal(Run(grid, "losa-0.7-2").step(5, later), mass_map(later, 0.7))


def test_losa_of_all_mass_is_dense():
    assert Run(GRIDS["ragged"], "losa-1").step(6, Blocks(GRIDS["ragged"])).all()


def lite_low(x, kept, level):
    """Pairs of blocks in which no token comes near its highest score over kept blocks."""
    low = torch.zeros_like(kept)
    for head in range(kept.shape[1]):
        queries, keys = (x.lists(y, 0, head) for y in (x.q, x.k))
        for i, query in enumerate(queries):
            seen = kept[0, head, i].nonzero().flatten().tolist()
            scores = {j: (query @ keys[j].T * x.scale).amax(1) for j in seen}
            top = torch.stack(list(scores.values())).amax(0)
            for j in seen:
                low[0, head, i, j] = bool(((scores[j] - top) < level).all())
    return low


@pytest.mark.parametrize("name", GRIDS)
def test_lite_drops_from_the_next_step_on_what_scored_low(name):
    grid = GRIDS[name]
    run = Run(grid, "lite--0.6")
    x = Blocks(grid)
    kept = torch.ones(1, 2, len(x.counts), len(x.counts), dtype=torch.bool)
    kept = kept if x.allowed is None else kept & x.allowed
    for step in range(4):
        assert torch.equal(run.step(step, x), kept)
        kept = kept & ~lite_low(x, kept, -0.6)
        x = Blocks(grid)
    assert kept.any(-1).all() and kept.float().mean() < 0.9


@pytest.mark.parametrize("name", GRIDS)
def test_haste_reuses_a_map_until_means_have_drifted(name):
    grid = GRIDS[name]
    run, first, other = Run(grid, "haste-0.7-0.5"), Blocks(grid), Blocks(grid)
    map_of = lambda x: Run(grid, "haste-0.7-0.5").step(0, x)  # noqa: E731
    assert torch.equal(run.step(0, first), map_of(first))
    # Each key of the first head moves by 0.4 in all, each of the second by 0.6, one way in a block.
    moved = Blocks(grid)
    is_token = torch.arange(first.size) < first.counts[:, None]
    signs = torch.randn(len(first.counts), 1, 6, dtype=torch.float64).sign()
    step = (signs * is_token[..., None]).flatten(0, 1) / 6
    moved.q, moved.k = first.q, first.k + torch.stack([0.4 * step, 0.6 * step])
    kept = run.step(1, moved)
    assert torch.equal(kept[:, 0], map_of(first)[:, 0])
    assert torch.equal(kept[:, 1], map_of(moved)[:, 1])
    # Drift counts from the map, not from the last step.
    moved.k = moved.k + torch.stack([0.4 * step, 0 * step])
    assert torch.equal(run.step(2, moved), map_of(moved))
    assert not torch.equal(map_of(moved)[:, 0], map_of(first)[:, 0])
    assert torch.equal(run.step(3, other), map_of(other))


def test_cube_keeps_fewer_in_later_steps():
    published = (
        *(1, 1, 0.55, 0.45, 0.35, 0.35, 0.3, 0.25, 0.25),
        *((0.2,) * 3 + (0.15,) * 3 + (0.1,) * 4 + (0.05,) * 31),
    )
    params = na.methods.find("cube").params((0.05,))
    state = {"scale": 1.0, "counts": torch.ones(1)}
    found = [
        share_of_step(params, na.methods.State(step=step, num_steps=50, **state))
        for step in range(50)
    ]
    assert found == list(published)
    grid = GRIDS["exact"]
    run, x = Run(grid, "cube-0.25", num_steps=10), Blocks(grid)
    counts = [run.step(step, x).sum(-1).unique().tolist() for step in range(10)]
    # 8 blocks; step 1 of 10 is step 5 of 50.
    assert counts == [[8], [2], [2], [2], [2], [2], [2], [2], [2], [2]]
    assert Run(grid, "cube-0.1", num_steps=10).step(1, x).sum(-1).unique().tolist() == [2]


@pytest.mark.parametrize("share", [0.5, 0.3])
@pytest.mark.parametrize("name", ["exact", "ragged"])
def test_bsa_attends_half_of_the_queries_and_copies_the_rest(name, share):
    grid = GRIDS[name]
    x = Blocks(grid)
    out = torch.zeros_like(x.q)
    kept_pairs = 0
    for head in range(2):
        queries, keys, values = (x.lists(y, 0, head) for y in (x.q, x.k, x.v))
        for i, query in enumerate(queries):
            centre = query[len(query) // 2]
            likeness = torch.cosine_similarity(query, centre[None], dim=-1).tolist()
            order = sorted(range(len(query)), key=lambda r: (likeness[r], r))
            kept = sorted(order[: max(1, math.ceil(share * len(query)))])
            scores = torch.stack([query[kept].mean(0) @ k.mean(0) * x.scale for k in keys])
            ordered, index = scores.softmax(0).sort(descending=True, stable=True)
            number = max(2, int((ordered.cumsum(0) - ordered < 0.6).sum()))
            chosen = sorted(index[:number].tolist())
            k, v = (torch.cat([part[j] for j in chosen]) for part in (keys, values))
            for r in range(len(query)):
                nearest = min(kept, key=lambda other: (abs(other - r), other))
                weights = (query[nearest] @ k.T * x.scale).softmax(0)
                out[0, head, i * x.size + r] = weights @ v
            kept_pairs += len(kept) * len(k)
    tokens = [na.to_raster(y, grid) for y in (x.q, x.k, x.v)]
    algorithm = f"bsa-0.6-{share}-2"
    found = na.nabla_attention(*tokens, grid, algorithm)
    torch.testing.assert_close(found, na.to_raster(out, grid))
    torch.testing.assert_close(
        na.nabla_attention(*tokens, grid, algorithm, backend="gather"), found
    )
    assert na.build_block_map(*tokens[:2], grid, algorithm).density < 1


@pytest.mark.parametrize(("vertical", "slash"), [(30, 40), (45, 30)])
@pytest.mark.parametrize("name", ["exact", "ragged"])
def test_minference_keeps_the_blocks_of_its_columns_and_diagonals(name, vertical, slash):
    grid = GRIDS[name]
    x = Blocks(grid)
    slots = [i * x.size + r for i, n in enumerate(x.counts.tolist()) for r in range(n)]
    sampled = [slots[n * len(slots) // 9] for n in range(9)]
    length, count = x.q.shape[2], len(x.counts)
    expected = torch.zeros(1, 2, count, count, dtype=torch.bool)
    for head in range(2):
        columns, diagonals = dict.fromkeys(range(length), 0.0), {}
        for row in sampled:
            probs = (x.k[0, head, slots] @ x.q[0, head, row] * x.scale).softmax(0)
            for column, prob in zip(slots, probs.tolist(), strict=True):
                columns[column] += prob
                diagonals[column - row] = diagonals.get(column - row, 0.0) + prob
        columns |= dict.fromkeys(slots[:30], math.inf)
        diagonals |= dict.fromkeys(range(-29, 30), math.inf)
        every = {offset: diagonals.get(offset, 0.0) for offset in range(1 - length, length)}
        for column in sorted(columns, key=lambda c: (-columns[c], c))[:vertical]:
            expected[0, head, :, column // x.size] = True
        for offset in sorted(every, key=lambda d: (-every[d], d))[:slash]:
            for row in range(max(0, -offset), min(length, length - offset)):
                expected[0, head, row // x.size, (row + offset) // x.size] = True
    tokens = [na.to_raster(y, grid) for y in (x.q, x.k)]
    mask = na.build_block_map(*tokens, grid, f"minference-{vertical}-{slash}-9").mask
    assert torch.equal(mask, expected) and not mask.all()


def test_methods_run_in_reduced_precision():
    """Rounded tokens keep about as much as the same numbers in fp64."""
    grid = BLOCK_GRIDS["ragged"]
    x = Blocks(grid)
    rounded = [na.to_raster(y, grid).bfloat16() for y in (x.q, x.k, x.v)]
    for name in na.methods.NAMES:
        method = na.methods.find(name)
        if "table" in method.needs:
            continue
        text = "-".join([name, *(p.example for p in method.parameters if p.default is None)])
        found = na.build_block_map(*rounded[:2], grid, text, v=rounded[2])
        exact = [y.double() for y in rounded]
        assert found.density == pytest.approx(
            na.build_block_map(*exact[:2], grid, text, v=exact[2]).density, abs=0.02
        )
        out = na.nabla_attention(*rounded, grid, text)
        assert out.dtype == torch.bfloat16 and out.isfinite().all()
