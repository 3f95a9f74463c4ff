import pytest
import torch
from tests.oracle import masked_attention, random_qkv, token_mask

import nabla_attn as na
from nabla_attn.block_selection import select_blocks
from nabla_attn.core.order import TokenLayout, to_blocks
from nabla_attn.methods import State, find, make_use
from nabla_attn.methods.dam import find_patterns

GRIDS = {
    "whole": na.TokenGrid(2, 4, 8, block=na.BlockShape(1, 2, 4)),
    "ragged": na.TokenGrid(3, 5, 7, block=na.BlockShape(2, 2, 3)),
    "one frame": na.TokenGrid(1, 6, 6, block=na.BlockShape(1, 3, 3)),
}


def patterns_by_definition(mean, threshold, share):
    """The formula, pair by pair, of one layer [heads, tokens, tokens]."""
    values = (mean.double().clamp(min=1e-10).sqrt() - 1) / 0.5
    if values.min() < 0:
        values = values - values.min()
    tokens = mean.shape[-1]
    found = []
    for head in values.tolist():
        high = [[x >= threshold for x in row] for row in head]
        diagonals, columns = [], []
        for offset in range(1 - tokens, tokens):
            pairs = [high[i][i + offset] for i in range(tokens) if 0 <= i + offset < tokens]
            if sum(pairs) / len(pairs) >= share:
                diagonals.append(offset)
        for column in range(tokens):
            if sum(row[column] for row in high) / tokens >= share:
                columns.append(column)
        found.append({"diagonals": diagonals, "columns": columns})
    return found


def select(q, k, grid, table, algorithm="dam-0.3"):
    q, k = (to_blocks(x, grid) for x in (q, k))
    return select_blocks(q, k, TokenLayout(grid), na.parse(algorithm), tables={"dam": table})


def calibrated(grid, calls, algorithm="dam-0.3"):
    use = na.parse(algorithm).uses[0]
    calibrator = find("dam").calibrate(find("dam").params(use.values), grid)
    for q, k, v in calls:
        counts = torch.ones(grid.num_blocks)
        state = State(scale=q.shape[-1] ** -0.5, counts=counts)
        calibrator.observe(*(to_blocks(x, grid) for x in (q, k, v)), state)
    return calibrator.entry()


@pytest.mark.parametrize("name", GRIDS)
def test_tables_hold_what_mean_attention_fills(name):
    grid = GRIDS[name]
    calls = [random_qkv(grid, dtype=torch.float64, sharpness=3.0) for _ in range(3)]
    mean = sum(torch.softmax(q[0] @ k[0].mT / q.shape[-1] ** 0.5, dim=-1) for q, k, _ in calls) / (
        3 + 1e-10
    )
    sizes = set()
    for threshold, share in ((0.2, 0.5), (0.1, 0.8), (0.3, 0.3)):
        entry = calibrated(grid, calls, f"dam-{threshold}-{share}")
        assert entry["frame"] == [grid.height, grid.width]
        assert entry["heads"] == patterns_by_definition(mean, threshold, share)
        sizes.add(sum(len(x) for head in entry["heads"] for x in head.values()))
    assert len(sizes) > 1


def test_pure_patterns_are_found_and_nothing_else():
    tokens = 24
    mean = torch.zeros(2, tokens, tokens)
    mean[0].diagonal(3).fill_(0.5)
    mean[0].diagonal(-7).fill_(0.5)
    mean[1, :, 5] = 0.9
    found = find_patterns(mean, 0.3, 0.8)
    assert found[0] == {"diagonals": [-7, 3], "columns": []}
    # Where a column meets a corner it is a diagonal of few pairs too.
    assert found[1]["columns"] == [5]
    assert found == patterns_by_definition(mean, 0.3, 0.8)
    # What lies no higher than the layer's lowest is no pattern.
    even = torch.full((1, 4, 4), 0.25)
    assert find_patterns(even, 0.3, 0.8) == [{"diagonals": [], "columns": []}]


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("name", GRIDS)
def test_patterns_continue_at_any_number_of_frames(name, frames):
    old = GRIDS[name]
    grid = na.TokenGrid(frames, old.height, old.width, block=old.block)
    per_frame, total = grid.height * grid.width, grid.num_tokens
    kinds = [([per_frame, -2 * per_frame, 3], [4, 10**6]), ([], [])]
    heads = [{"diagonals": diagonals, "columns": columns} for diagonals, columns in kinds]
    q, k, v = random_qkv(grid, dtype=torch.float64)
    found = select(q, k, grid, {"frame": [grid.height, grid.width], "heads": heads})
    tokens = torch.arange(total)
    apart = tokens - tokens[:, None]
    blocks = to_blocks(tokens[None, None, :, None] + 1, grid).flatten().view(grid.num_blocks, -1)
    for head, (diagonals, columns) in enumerate(kinds):
        pairs = torch.isin(apart, torch.tensor([0, *diagonals]))
        pairs |= torch.isin(tokens, torch.tensor(columns, dtype=torch.long))
        expected = torch.eye(grid.num_blocks, dtype=torch.bool)
        for row, mine in enumerate(blocks):
            for column, theirs in enumerate(blocks):
                some = pairs[mine[mine > 0] - 1][:, theirs[theirs > 0] - 1]
                expected[row, column] |= bool(some.any())
        assert torch.equal(found.mask[0, head], expected), head
    assert not (apart == 0)[None].logical_and(~token_mask(found, grid)[0]).any()
    assert masked_attention(q, k, v, token_mask(found, grid)).isfinite().all()


def test_tables_that_do_not_fit_are_refused():
    grid = GRIDS["whole"]
    q, k, v = random_qkv(grid)
    good = calibrated(grid, [(q.double(), k.double(), v.double())])
    assert select(q, k, grid, good).density > 0
    with pytest.raises(ValueError, match="nabla calibrate --method dam"):
        na.nabla_attention(q, k, v, grid, "dam-0.3")
    for damaged in ({}, {"frame": [4, 8], "heads": [{"diagonals": ["a"], "columns": []}] * 2}, []):
        with pytest.raises(ValueError, match="not one of dam's"):
            select(q, k, grid, damaged)
    wide = na.TokenGrid(2, 4, 9, block=grid.block)
    with pytest.raises(ValueError, match=r"frames of 4x8 tokens.*got 2 heads and 4x9"):
        select(*random_qkv(wide)[:2], wide, good)
    with pytest.raises(ValueError, match=r"for 2 heads .*got 3 heads"):
        select(*random_qkv(grid, heads=3)[:2], grid, good)
    with pytest.raises(ValueError, match=r"at most 2,048: got 4,096"):
        find("dam").calibrate(None, na.TokenGrid(4, 32, 32))


def test_defaults_are_the_published():
    assert make_use("dam", 0.3) == make_use("dam", 0.3, 0.8)
