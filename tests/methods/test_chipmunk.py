import math

import pytest
import torch
from tests.oracle import random_qkv

import nabla_attn as na
from nabla_attn.attention import attend
from nabla_attn.block_selection import select_blocks
from nabla_attn.core.order import TokenLayout
from nabla_attn.cost.memory import force_memory
from nabla_attn.methods import Moment

GRIDS = {
    "whole": na.TokenGrid(2, 8, 8, block=na.BlockShape(1, 4, 4)),
    "ragged": na.TokenGrid(3, 5, 7, block=na.BlockShape(2, 3, 4)),
    "one frame": na.TokenGrid(1, 9, 6, block=na.BlockShape(1, 3, 3)),
}


class Run:
    """Calls of one layer, step by step, with its memory."""

    def __init__(self, grid, algorithm, *, layer=2, num_text=0, **options):
        self.layout = TokenLayout(grid, 0, num_text)
        self.algorithm, self.layer, self.options = na.parse(algorithm), layer, options
        self.memory = {}

    def __call__(self, step, q, k, v):
        def select(*args, **kwargs):
            moment = Moment(step=step, num_steps=50, layer=self.layer, num_layers=4)
            return select_blocks(*args, **kwargs, moment=moment, memory=self.memory)

        return attend(q, k, v, self.layout, self.algorithm, select=select, **self.options)


def softmax_over(q, k, v, keys):
    """Attention of queries over some keys."""
    scores = q @ k[keys].T / math.sqrt(q.shape[-1])
    return scores.softmax(-1) @ v[keys]


def blocks_of(grid):
    slots = na.to_blocks(torch.arange(1, grid.num_tokens + 1)[None, None, :, None], grid)
    return [row[row > 0] - 1 for row in slots.flatten().view(grid.num_blocks, -1)]


def definition(first, second, later, grid, top, num_text=0):
    """Outputs of two full steps and a sparse one, one head, from the formula; nothing at random."""
    total = first[0].shape[0]
    text = list(range(grid.num_tokens, total))
    rows = [*blocks_of(grid)]
    lse = (first[0] @ first[1].T / math.sqrt(first[0].shape[-1])).logsumexp(-1)
    everything = torch.arange(total)
    dense = softmax_over(*second, everything)
    out = softmax_over(*later, everything)
    kept = []
    for row in rows:
        scores = second[0][row] @ second[1].T / math.sqrt(second[0].shape[-1])
        sums = (scores - lse[row][:, None]).exp().sum(0)[: grid.num_tokens]
        # Ties go to the column that comes first in block order.
        order = torch.cat(rows)
        best = sorted(order.tolist(), key=lambda c: -sums[c].item())[:top]
        keys = torch.tensor(sorted(best) + text)
        rest = dense[row] - softmax_over(second[0][row], *second[1:], keys)
        out[row] = rest + softmax_over(later[0][row], *later[1:], keys)
        kept.append(set(best))
    return out, kept


@pytest.mark.parametrize("num_text", [0, 3])
@pytest.mark.parametrize("name", GRIDS)
def test_a_sparse_step_is_its_columns_and_what_the_full_step_had_beside(name, num_text):
    grid = GRIDS[name]
    run = Run(grid, "chipmunk-0.2-0", num_text=num_text)
    calls = [random_qkv(grid, batch=2, num_text=num_text, dtype=torch.float64) for _ in range(3)]
    dense = [na.nabla_attention(*call, grid, "dense", text_after=num_text) for call in calls]
    outs = [run(step, *call) for step, call in enumerate(calls)]
    for (out, found), expected in zip(outs[:2], dense, strict=False):
        torch.testing.assert_close(out, expected)
        assert found.density == 1
    top = round(0.2 * grid.num_tokens)
    for sample in range(2):
        for head in range(2):
            heads = [[x[sample, head] for x in call] for call in calls]
            expected, _ = definition(*heads, grid, top, num_text)
            torch.testing.assert_close(outs[2][0][sample, head], expected, atol=1e-9, rtol=0)
    pairs = top * grid.num_tokens + (2 * grid.num_tokens + num_text) * num_text
    assert outs[2][1].density == pytest.approx(pairs / (grid.num_tokens + num_text) ** 2)
    assert outs[2][1].sample(1).density == pytest.approx(outs[2][1].density)


@pytest.mark.parametrize("unit", ["columns", "blocks"])
@pytest.mark.parametrize("backend", ["reference", "gather"])
def test_unchanged_tokens_come_out_dense(unit, backend):
    grid = GRIDS["ragged"]
    run = Run(grid, f"chipmunk-0.2-0.05-1-10-0-{unit}", backend=backend)
    call = random_qkv(grid, dtype=torch.float64)
    dense = na.nabla_attention(*call, grid, "dense")
    for step in range(4):
        out, found = run(step, *call)
        torch.testing.assert_close(out, dense)
        assert (found.density < 1) == (step > 1)


def test_copies_beyond_the_free_memory_are_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr("nabla_attn.attention.free_bytes", lambda device: 1000)
    grid = GRIDS["ragged"]
    call = random_qkv(grid)
    for unit in ("columns", "blocks"):
        run = Run(grid, f"chipmunk-0.9-0.05-1-10-0-{unit}", backend="gather")
        run(0, *call), run(1, *call)
        if unit == "blocks":
            run(2, *call)
            continue
        with pytest.raises(ValueError, match=r"MiB where 0 MiB are free.*chipmunk-unit=blocks"):
            run(2, *call)
        with force_memory():
            run(2, *call)


def test_ties_go_to_the_first_column():
    grid = GRIDS["whole"]
    run = Run(grid, "chipmunk-0.1-0")
    q, k, v = random_qkv(grid, dtype=torch.float64)
    k = torch.zeros_like(k)
    for step in range(2):
        run(step, q, k, v)
    kept = run.memory["chipmunk-0.1-0"]["kept"]
    first = torch.arange(grid.num_slots) < round(0.1 * grid.num_tokens)
    assert torch.equal(kept, first.expand_as(kept))


def test_steps_layers_and_a_late_start():
    grid = GRIDS["whole"]
    q, k, v = random_qkv(grid)

    def full(algorithm, steps, layer=2):
        run = Run(grid, algorithm, layer=layer)
        return [step for step in steps if run(step, q, k, v)[1].density == 1]

    assert full("chipmunk-0.1", range(22)) == [0, 1, 10, 20]
    assert full("chipmunk-0.1-0.01-0-4", range(10)) == [0, 1, 4, 8]
    # Behind dense steps of a schedule the first two calls are full.
    assert full("chipmunk-0.1", range(5, 15)) == [5, 6, 10]
    assert full("chipmunk-0.1", range(4), layer=1) == [0, 1, 2, 3]
    assert full("chipmunk-0.1-0.01-0-10-0", range(4), layer=1) == [0, 1]


def test_random_and_local_columns_join_the_best():
    grid = na.TokenGrid(3, 12, 12, block=na.BlockShape(1, 4, 4))
    q, k, v = random_qkv(grid, batch=2, dtype=torch.float64)
    runs = {text: Run(grid, text) for text in ("chipmunk-0.1-0", "chipmunk-0.1-0.2-3")}
    kept = []
    for text, run in runs.items():
        for step in range(2):
            run(step, q, k, v)
        kept.append(run.memory[text]["kept"])
    assert not (kept[0] & ~kept[1]).any()
    local = na.build_block_map(q, k, grid, "sta-3-3-3").mask[0, 0].repeat_interleave(16, 1)
    assert not (local & ~kept[1]).any()
    extra = (kept[1] & ~kept[0] & ~local).sum() / (~kept[0] & ~local).sum()
    assert 0.1 < extra < 0.3


def test_other_shapes_start_anew_and_padded_text_has_no_part():
    grid = GRIDS["ragged"]
    valid = torch.tensor([[True, True, False]])
    outs = []
    for size in (1.0, 1e3):
        run = Run(grid, "chipmunk-0.2-0", num_text=3, text_valid=valid)
        torch.manual_seed(0)
        for step in range(3):
            q, k, v = random_qkv(grid, num_text=3, dtype=torch.float64)
            k[:, :, -1], v[:, :, -1] = size, size
            out, found = run(step, q, k, v)
        assert found.density < 1
        outs.append(out[:, :, :-3])
    torch.testing.assert_close(*outs)
    run = Run(grid, "chipmunk-0.2-0")
    for step in range(3):
        run(step, *random_qkv(grid))
    assert run(3, *random_qkv(grid, batch=2))[1].density == 1


def test_gradients_and_packed_clips_are_refused():
    grid = GRIDS["whole"]
    q, k, v = random_qkv(grid)
    with pytest.raises(ValueError, match=r"chipmunk-0\.1 is for inference"):
        na.nabla_attention(q.requires_grad_(), k, v, grid, "chipmunk-0.1")
    packed = na.TokenGrid(2, 8, 8, segments=(1, 1))
    with pytest.raises(ValueError, match="takes one clip"):
        na.nabla_attention(*random_qkv(packed), packed, "chipmunk-0.1")
