"""PAROAttention and Sparse-vDiT: what calibration finds, and what a table makes of a call."""

from functools import partial

import pytest
import torch
from tests.oracle import masked_attention, random_qkv

import nabla_attn as na
from nabla_attn import methods
from nabla_attn.attention import attend
from nabla_attn.block_selection import select_blocks
from nabla_attn.core.order import TokenLayout, block_order, to_blocks
from nabla_attn.core.quantise import to_integers
from nabla_attn.core.token_orders import parse_order
from nabla_attn.methods import Moment, State, paro, vdit

GRIDS = {
    "whole": na.TokenGrid(4, 8, 8, block=na.BlockShape(1, 4, 4)),
    "ragged": na.TokenGrid(3, 11, 13, block=na.BlockShape(1, 4, 4)),
    "one frame": na.TokenGrid(1, 9, 7, block=na.BlockShape(1, 3, 3)),
}
CPU = torch.device("cpu")


def entry_of(algorithm, grid, calls, num_steps=2):
    """The table entry of a layer from (q, k, v) in raster order, one call a step."""
    (use,) = na.parse(algorithm).uses
    method = methods.find(use.name)
    found = method.calibrate(method.params(use.values), grid)
    counts = block_order(TokenLayout(grid), CPU).counts
    for step, call in enumerate(calls):
        state = State(
            scale=call[0].shape[-1] ** -0.5, counts=counts, step=step, num_steps=num_steps
        )
        found.observe(*(to_blocks(x, grid) for x in call), state)
    return found.entry()


def run(algorithm, grid, call, entry, step=0, heads=None, num_text=0):
    """Output and map of a call with a table."""
    config = na.parse(algorithm)
    moment = Moment(step=step, num_steps=2, heads=heads)
    select = partial(select_blocks, moment=moment, tables={config.uses[0].name: entry})
    return attend(*call, TokenLayout(grid, 0, num_text), config, select=select)


def along_time(grid, is_temporal):
    """Queries that find keys of nearby places, or of the same place in all frames."""
    raster, patches = torch.arange(grid.num_tokens), grid.height * grid.width
    at = raster % patches * grid.frames if is_temporal else raster
    near = (at[:, None] - at).abs() < (1 if is_temporal else patches // 4)
    # A matrix whose product with itself is large where tokens are near.
    values, vectors = torch.linalg.eigh(near.double() * 1.0)
    x = vectors[:, -32:] * values[-32:].clamp_min(0).sqrt()
    return x * 5


def test_an_order_s_metrics_and_sums_are_those_of_its_blocks():
    for grid in GRIDS.values():
        q, k, _ = random_qkv(grid, dtype=torch.float64)
        block = grid.block.tokens
        probs = (q[0] @ k[0].mT * q.shape[-1] ** -0.5).softmax(dim=-1)
        for name in paro.ORDERS:
            tokens = parse_order(name).permutation(grid.frames, grid.height, grid.width)
            order = paro.named_order(name, grid, CPU).tokens[0, 0]
            sums, metrics = paro.cut_attention(q[0] * q.shape[-1] ** -0.5, k[0], order, block)
            for head in range(2):
                moved = probs[head][tokens][:, tokens]
                cut = [
                    [part.flatten() for part in rows.split(block, dim=1)]
                    for rows in moved.split(block)
                ]
                expected = torch.tensor([[part.sum() for part in row] for row in cut])
                torch.testing.assert_close(sums[head], expected.double(), atol=1e-9, rtol=0)
                parts = [part for row in cut for part in row]
                empty = [(part < 1e-3).double().mean() >= 0.9 for part in parts]
                alike = [part.max() / part.mean() for part in parts]
                want = torch.tensor([sum(empty) / len(parts), sum(alike) / len(parts)])
                torch.testing.assert_close(metrics[:, head], want.double(), atol=1e-6, rtol=1e-6)


def test_the_order_with_more_empty_and_more_even_blocks_is_taken():
    sparse = torch.tensor([0.2, 0.6, 0.6])
    quant = torch.tensor([5.0, 9.0, 7.0])
    metrics = torch.stack([sparse, quant], dim=1)[..., None]
    assert paro.choose_orders(metrics, 1.0).item() == 1
    assert paro.choose_orders(metrics, 0.0).item() == 0
    assert paro.choose_orders(metrics, 0.5).item() == 2


@pytest.mark.parametrize("name", GRIDS)
def test_paro_attends_the_highest_blocks_of_each_head_s_order(name):
    grid, block = GRIDS[name], GRIDS[name].block.tokens
    calls = [random_qkv(grid, heads=3, dtype=torch.float64) for _ in range(2)]
    entry = entry_of("paro-0.3", grid, calls)
    assert len(entry["masks"]) == 2 and entry["steps"] == 2
    for step, (q, k, v) in enumerate(calls):
        out, found = run("paro-0.3", grid, (q, k, v), entry, step)
        probs = (q[0] @ k[0].mT * q.shape[-1] ** -0.5).softmax(dim=-1)
        for head, order in enumerate(entry["orders"]):
            tokens = parse_order(order).permutation(grid.frames, grid.height, grid.width)
            rows = probs[head][tokens][:, tokens].split(block)
            sums = [[x.sum().item() for x in row.split(block, dim=1)] for row in rows]
            flat = sorted(((-x, i, j) for i, row in enumerate(sums) for j, x in enumerate(row)))
            count = -(-3 * len(flat) // 10)
            kept = torch.zeros(len(sums), len(sums)).bool()
            for _, i, j in flat[:count]:
                kept[i, j] = True
            for i, row in enumerate(sums):
                kept[i, row.index(max(row))] = True
            assert torch.equal(found.mask[0, head], kept)
            at = tokens.argsort() // block
            expected = masked_attention(*(x[:, [head]] for x in (q, k, v)), kept[at][:, at])
            torch.testing.assert_close(out[:, [head]], expected, atol=1e-9, rtol=0)
    # Later steps share the last mask, and a call of some heads has theirs.
    late = run("paro-0.3", grid, calls[0], entry, step=9)[1]
    assert torch.equal(late.mask, run("paro-0.3", grid, calls[0], entry, step=1)[1].mask)
    some = [x[:, [2, 0]] for x in calls[0]]
    part = run("paro-0.3", grid, some, entry, heads=(2, 0))[0]
    whole = run("paro-0.3", grid, calls[0], entry)[0]
    torch.testing.assert_close(part, whole[:, [2, 0]], atol=1e-9, rtol=0)


def test_a_head_along_time_is_laid_out_along_time():
    grid = na.TokenGrid(8, 6, 8, block=na.BlockShape(1, 4, 4))
    x = along_time(grid, True)[None, None]
    entry = entry_of("paro-0.3", grid, [(x, x, x)])
    assert entry["orders"][0] in ("hwt", "wht")


@pytest.mark.parametrize(("bits", "largest"), [("int8", 127), ("int4", 7)])
def test_tiles_are_rounded_to_integers(bits, largest):
    grid = GRIDS["whole"]
    call = random_qkv(grid, heads=2, num_text=5, dtype=torch.float64)
    video = tuple(x[:, :, : grid.num_tokens] for x in call)
    entry = entry_of("paro-1", grid, [video])
    out, _ = run(f"paro-1-{bits}", grid, call, entry, num_text=5)
    heads = []
    for head, order in enumerate(entry["orders"]):
        tokens = parse_order(order).permutation(grid.frames, grid.height, grid.width)
        tokens = torch.cat([tokens, torch.arange(5) + grid.num_tokens])
        rounded = []
        for x in call:
            tiles = []
            for tile in x[0, head][tokens].split(16):
                scale = tile.abs().max() / largest
                tiles.append((tile / scale).round() * scale)
            rounded.append(torch.cat(tiles)[tokens.argsort()])
        heads.append(torch.stack(rounded))
    q, k, v = torch.stack(heads, dim=1)[:, None]
    mask = torch.ones(q.shape[2], q.shape[2]).bool()
    torch.testing.assert_close(out, masked_attention(q, k, v, mask), atol=1e-6, rtol=0)
    assert to_integers(torch.zeros(4, 4), largest).isfinite().all()


@pytest.mark.parametrize("method", ["paro-0.3", "vdit-0.3"])
def test_tables_of_another_size_are_refused(method):
    entry = entry_of(method, GRIDS["whole"], [random_qkv(GRIDS["whole"])])
    with pytest.raises(ValueError, match=r"is for \[4, 8, 8\] tokens in blocks of 16: got \[3, 11"):
        run(method, GRIDS["ragged"], random_qkv(GRIDS["ragged"]), entry)


def test_tables_of_another_share_are_refused():
    entry = entry_of("paro-0.3", GRIDS["whole"], [random_qkv(GRIDS["whole"])])
    with pytest.raises(ValueError, match=r"keeps a share of 0\.3: got paro-0\.5"):
        run("paro-0.5", GRIDS["whole"], random_qkv(GRIDS["whole"]), entry)


def token_pattern(mode, grid, share, columns):
    """Who attends whom in a mode, token by token, in raster order."""
    total, block = grid.num_tokens, grid.block.tokens
    raster, patches = torch.arange(total), grid.height * grid.width
    place = raster % patches * grid.frames + raster // patches if mode == "frames" else raster
    if mode == "columns":
        return torch.isin(raster // block, torch.tensor(columns)).expand(total, total)
    count = -(-total // block)
    width = max(1, int(total * (1 - (1 - share) ** 0.5)) // block)
    at = place // block
    return (at[:, None] - at).abs() < min(width, count)


@pytest.mark.parametrize("name", GRIDS)
def test_the_errors_of_the_patterns_are_those_of_their_outputs(name):
    grid = GRIDS[name]
    q, k, v = random_qkv(grid, heads=2, dtype=torch.float64)
    scaled = q[0] * q.shape[-1] ** -0.5
    mass = vdit.column_masses(scaled, k[0], grid.block.tokens)
    columns = mass.argsort(dim=1, descending=True, stable=True)[:, :3].sort(dim=1).values
    errors = vdit.errors_of_modes(scaled, k[0], v[0], grid, 0.3, columns)
    everything = torch.ones(grid.num_tokens, grid.num_tokens).bool()
    exact = masked_attention(q, k, v, everything)[0]
    torch.testing.assert_close(mass.sum(dim=1), torch.full((2,), float(grid.num_tokens)).double())
    for head in range(2):
        one = [x[:, [head]] for x in (q, k, v)]
        expected = [0.0, exact[head].square().mean().item()]
        for mode in vdit.MODES[2:]:
            mask = token_pattern(mode, grid, 0.3, columns[head].tolist())
            out = masked_attention(*one, mask)[0, 0]
            expected.append((out - exact[head]).square().mean().item())
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(errors[head], expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("mode", vdit.MODES)
def test_a_pattern_is_attended_as_it_was_searched(name, mode):
    grid = GRIDS[name]
    q, k, v = random_qkv(grid, heads=2, dtype=torch.float64)
    sizes = [grid.frames, grid.height, grid.width]
    heads = [{"mode": mode, "columns": [0, 2]}, {"mode": "full"}]
    entry = {"tokens": sizes, "block": grid.block.tokens, "share": 0.3, "steps": [heads]}
    out, found = run("vdit-0.3", grid, (q, k, v), entry)
    everything = torch.ones(grid.num_tokens, grid.num_tokens).bool()
    full = masked_attention(q, k, v, everything)
    torch.testing.assert_close(out[:, 1], full[:, 1], atol=1e-9, rtol=0)
    mask = everything if mode == "full" else token_pattern(mode, grid, 0.3, [0, 2])
    expected = masked_attention(q, k, v, mask)[:, 0]
    expected = torch.zeros_like(expected) if mode == "skip" else expected
    torch.testing.assert_close(out[:, 0], expected, atol=1e-9, rtol=0)
    if mode not in ("skip", "full"):
        density = found.head_density[0, 0].item()
        assert density == pytest.approx(mask.double().mean().item(), abs=1e-6)


def test_heads_choose_by_error_and_price_and_stay_full_where_all_are_bad():
    losses = torch.tensor([[0.5, 0.2, 0.3, 0.1, 0.4], [0.5, 2.0, 3.0, 1.1, 4.0]])
    assert vdit.choose_modes(losses, 1.0) == ["frames", "full"]
    assert vdit.choose_modes(losses, 2.0) == ["frames", "frames"]


def test_without_a_price_the_least_error_wins_and_time_is_found():
    grid = na.TokenGrid(8, 6, 8, block=na.BlockShape(1, 4, 4))
    far, near = along_time(grid, True)[None, None], along_time(grid, False)[None, None]
    v = torch.randn(1, 2, grid.num_tokens, 16, dtype=torch.float64)
    x = torch.cat([far, near], dim=1)
    entry = entry_of("vdit-0.4-price=0", grid, [(x, x, v)])
    assert [head["mode"] for head in entry["steps"][0]] == ["frames", "band"]
    strict = entry_of("vdit-0.4-price=0-worst=0", grid, [(x, x, v)])
    assert [head["mode"] for head in strict["steps"][0]] == ["full", "full"]
