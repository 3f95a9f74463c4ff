"""What trained parts add to methods, against formulas in float64: outputs and all gradients."""

from functools import partial

import pytest
import torch
from torch import nn

import nabla_attn as na
from nabla_attn import methods
from nabla_attn.attention import attend
from nabla_attn.block_selection import select_blocks
from nabla_attn.core.order import TokenLayout

BLOCK = na.BlockShape(1, 4, 4)
GRIDS = {
    "exact": na.TokenGrid(2, 8, 8, block=BLOCK),
    "ragged": na.TokenGrid(3, 7, 9, block=BLOCK),
    "one frame": na.TokenGrid(1, 10, 12, block=BLOCK),
}
HEADS, DIM, WIDTH, TEXT = 3, 6, 10, 5


def draw(grid, num_text=0, seed=0):
    """Queries, keys, values and hidden states in raster order."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, dtype=torch.float64, generator=generator)
    shape = (2, HEADS, grid.num_tokens + num_text, DIM)
    return [draw(shape) for _ in range(3)], draw(2, grid.num_tokens, WIDTH)


def parts_for(name, seed=1, scale=1.0):
    """Parts of a method with random values."""
    torch.manual_seed(seed)
    part = methods.find(name).parts(heads=HEADS, dim=DIM, width=WIDTH).double()
    for weight in part.parameters():
        nn.init.normal_(weight, std=scale)
    return dict(part.named_parameters())


def block_of_tokens(grid):
    """The block of every token in raster order, by its coordinates."""
    axes = [
        torch.arange(grid.frames) // BLOCK.frames,
        torch.arange(grid.height) // BLOCK.height,
        torch.arange(grid.width) // BLOCK.width,
    ]
    frame, row, column = torch.meshgrid(*axes, indexing="ij")
    rows, columns = row.max() + 1, column.max() + 1
    return ((frame * rows + row) * columns + column).flatten()


def vsa(q, k, v, grid, hidden, weight, bias):
    """Pooled attention, times a linear layer of hidden states."""
    block = block_of_tokens(grid)
    pool = nn.functional.one_hot(block).double()
    pool = (pool / pool.sum(0)).T
    scores = (pool @ q) @ (pool @ k).mT / DIM**0.5
    coarse = (scores.softmax(-1) @ (pool @ v))[:, :, block]
    gate = (hidden @ weight.T + bias).unflatten(2, (HEADS, DIM)).transpose(1, 2)
    return gate * coarse


def sla(q, k, v, grid, hidden, weight, bias):
    """Linear attention over all tokens, through a projection."""
    pairs = q.softmax(-1) @ k.softmax(-1).mT
    return (pairs / (pairs.sum(-1, keepdim=True) + 1e-5) @ v) @ weight.T + bias


@pytest.mark.parametrize("num_text", [0, TEXT])
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("oracle", [vsa, sla])
def test_parts_add_what_their_formula_says_with_its_gradients(oracle, name, num_text):
    grid, method = GRIDS[name], oracle.__name__
    config, layout = na.parse(f"{method}-0.3"), TokenLayout(grid, text_after=num_text)
    found = []
    for is_oracle in (False, True):
        (q, k, v), hidden = draw(grid, num_text)
        parts = parts_for(method)
        leaves = [x.requires_grad_() for x in (q, k, v, hidden, *parts.values())]
        if is_oracle:
            out, _ = attend(q, k, v, layout, config, backend="reference")
            video = [x[:, :, : grid.num_tokens] for x in (q, k, v)]
            added = oracle(*video, grid, hidden, *parts.values())
            out = out + nn.functional.pad(added, (0, 0, 0, num_text))
        else:
            out, _ = attend(q, k, v, layout, config, parts={method: parts}, hidden=hidden)
        out.sin().sum().backward()
        found.append([out, *(x.grad for x in leaves)])
    for mine, expected in zip(*found, strict=True):
        if expected is None:  # SLA takes no hidden states
            assert mine is None or not mine.any()
            continue
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["vsa", "sla"])
def test_new_parts_change_no_bit(method):
    grid = GRIDS["ragged"]
    tokens, hidden = draw(grid)
    part = methods.find(method).parts(heads=HEADS, dim=DIM, width=WIDTH)
    config, parts = na.parse(f"{method}-0.3"), {method: dict(part.named_parameters())}
    plain, _ = attend(*tokens, TokenLayout(grid), config)
    neutral, _ = attend(*tokens, TokenLayout(grid), config, parts=parts, hidden=hidden)
    assert torch.equal(plain, neutral)


@pytest.mark.parametrize("method", ["vsa", "sla"])
def test_some_heads_get_what_they_would_get_among_all(method):
    grid = GRIDS["ragged"]
    tokens, hidden = draw(grid)
    options = {"parts": {method: parts_for(method)}, "hidden": hidden}
    layout, config = TokenLayout(grid), na.parse(f"{method}-0.3")
    whole, _ = attend(*tokens, layout, config, **options)
    select = partial(select_blocks, moment=methods.Moment(heads=(2, 0)))
    some = [x[:, [2, 0]] for x in tokens]
    found, _ = attend(*some, layout, config, select=select, **options)
    torch.testing.assert_close(found, whole[:, [2, 0]])


def test_packed_clips_keep_their_gates_apart():
    grid = na.TokenGrid(4, 8, 8, block=BLOCK, segments=(2, 2))
    tokens, hidden = draw(grid)
    options = {"parts": {"vsa": parts_for("vsa")}}
    config, half = na.parse("vsa-0.3"), grid.num_tokens // 2
    both, _ = attend(*tokens, TokenLayout(grid), config, hidden=hidden, **options)
    alone, _ = attend(
        *(x[:, :, :half] for x in tokens),
        TokenLayout(GRIDS["exact"]),
        config,
        hidden=hidden[:, :half],
        **options,
    )
    torch.testing.assert_close(both[:, :, :half], alone)
