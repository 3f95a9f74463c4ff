"""Tails: the estimate of dropped blocks against its formula, its exact limits and gradients."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from tests.backends.test_backends import assert_within_budget
from tests.models.tiny_models import TINY, relative_error, run
from tests.oracle import ODD_GRIDS, random_qkv
from tests.wan.live_memory import measure_peak
from torch.nn.functional import scaled_dot_product_attention

import nabla_attn as na
from nabla_attn.attention import attend
from nabla_attn.backends import flex, gather, workers
from nabla_attn.backends.flex_options import FlexOptions, flex_options
from nabla_attn.core import losses
from nabla_attn.core import tail as tail_room
from nabla_attn.core.losses import BlockCall
from nabla_attn.core.order import TokenLayout
from nabla_attn.core.tail import build_tail, with_summaries

TAILS = ("mean", "first")
tails = pytest.mark.parametrize("tail", TAILS)
grids = pytest.mark.parametrize("grid", ODD_GRIDS.values(), ids=ODD_GRIDS.keys())
backends_that_train = pytest.mark.parametrize("backend", ["reference", "gather"])


def block_of_tokens(grid):
    """[tokens]: the block of every token of the video, in raster order."""
    slots = na.to_blocks(torch.arange(1, grid.num_tokens + 1)[None, None, :, None], grid).flatten()
    blocks = torch.arange(grid.num_blocks).repeat_interleave(grid.block.tokens)
    return blocks[slots > 0][(slots[slots > 0] - 1).argsort()]


def clip_of_tokens(grid):
    per_frame = torch.arange(len(grid.segment_frames)).repeat_interleave(
        torch.tensor(grid.segment_frames)
    )
    return per_frame.repeat_interleave(grid.height * grid.width)


def estimated_attention(q, k, v, grid, block_map, tail, *, num_text=0, text_valid=None):
    """The formula token by token, text behind the video; differentiable, in the inputs' dtype.

    Every token of a dropped block gets the score of the block's mean key; with "first", the values
    gain scale * mass * q @ (mean of (k - mean k) (v - mean v)ᵀ over the tokens of the clip).
    """
    tokens, scale = grid.num_tokens, q.shape[-1] ** -0.5
    blocks, clips = block_of_tokens(grid), clip_of_tokens(grid)
    count = grid.num_blocks
    member = torch.nn.functional.one_hot(blocks, count).to(q.dtype)
    means_k, means_v = (
        member @ ((member.T @ x[:, :, :tokens]) / member.sum(0)[:, None]) for x in (k, v)
    )
    kept = block_map.mask[:, :, :count, :count][:, :, blocks][..., blocks]
    own_clip = clips[:, None] == clips[None, :]
    scores = scale * q @ k.transpose(-1, -2)
    estimate = scale * q[:, :, :tokens] @ means_k.transpose(-1, -2)
    video = torch.where(kept, scores[:, :, :tokens, :tokens], estimate)
    video = video.masked_fill(~own_clip, float("-inf"))
    scores = torch.cat(
        [torch.cat([video, scores[:, :, :tokens, tokens:]], -1), scores[:, :, tokens:]], -2
    )
    if text_valid is not None:
        hidden = torch.cat([text_valid.new_zeros(len(text_valid), tokens), ~text_valid], dim=1)
        scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
    probs = scores.softmax(-1)
    held = probs[:, :, :tokens, :tokens]
    out = held.masked_fill(~kept, 0) @ v[:, :, :tokens] + held.masked_fill(kept, 0) @ means_v
    out = out + probs[:, :, :tokens, tokens:] @ v[:, :, tokens:]
    if tail == "first":
        mass = held.masked_fill(kept, 0).sum(-1, keepdim=True)
        away_k, away_v = k[:, :, :tokens] - means_k, v[:, :, :tokens] - means_v
        for clip in clips.unique():
            mine = clips == clip
            slope = away_k[:, :, mine].transpose(-1, -2) @ away_v[:, :, mine] / mine.sum()
            rise = scale * mass * (q[:, :, :tokens] @ slope)
            out = out + torch.where(mine[:, None], rise, 0)
    return torch.cat([out, probs[:, :, tokens:] @ v], dim=2)


def both(grid, tail, backend, dtype, *, config="nabla-0.3", batch=2, num_text=0, text_valid=None):
    """Inputs, and ours and the formula's output for the same map."""
    q, k, v = random_qkv(grid, batch=batch, num_text=num_text, dtype=dtype)
    inputs = [x.requires_grad_(backend != "flex") for x in (q, k, v)]
    config = na.parse(f"{config}_tail-{tail}")
    options = {"text_after": num_text, "text_valid": text_valid}
    bmap = na.build_block_map(q, k, grid, config, **options)
    assert grid.num_blocks < 4 or bmap.density < 1
    out = na.nabla_attention(*inputs, grid, config, backend=backend, **options)

    def formula(*x):
        kwargs = {"num_text": num_text, "text_valid": text_valid}
        return estimated_attention(*x, grid, bmap, tail, **kwargs)

    return inputs, out, formula


@grids
@tails
@backends_that_train
def test_reference_and_gather_are_the_formula_in_float64(grid, tail, backend):
    inputs, out, formula = both(grid, tail, backend, torch.float64)
    expected = formula(*inputs)
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-9)
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, inputs, grad, retain_graph=True)
    wanted = torch.autograd.grad(expected, inputs, grad)
    for ours, truth in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, truth, atol=1e-9, rtol=1e-8)


@grids
@tails
@backends_that_train
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_forward_and_backward_within_the_budget(grid, tail, backend, dtype):
    inputs, out, formula = both(grid, tail, backend, dtype)
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, inputs, grad)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    low_inputs = [x.detach().clone().requires_grad_() for x in inputs]
    exact_out, low_out = formula(*exact_inputs), formula(*low_inputs)
    exact = torch.autograd.grad(exact_out, exact_inputs, grad.double())
    low = torch.autograd.grad(low_out, low_inputs, grad)
    assert_within_budget(out, exact_out, low_out)
    for ours, truth, reference in zip(got, exact, low, strict=True):
        assert_within_budget(ours, truth, reference)


@tails
@backends_that_train
@pytest.mark.parametrize("name", ["exact", "ragged", "cube-blocks"])
def test_joint_text_with_padding_is_never_summarised(name, tail, backend):
    valid = torch.ones(3, 9, dtype=torch.bool)
    valid[1, 4:] = False
    valid[2] = False
    options = {"batch": 3, "num_text": 9, "text_valid": valid}
    inputs, out, formula = both(ODD_GRIDS[name], tail, backend, torch.float64, **options)
    torch.testing.assert_close(out, formula(*inputs), atol=1e-10, rtol=1e-9)
    grad_k = torch.autograd.grad(out.sum(), inputs[1])[0]
    assert (grad_k[2, :, -9:] == 0).all()


@tails
@backends_that_train
def test_keeping_everything_is_dense_attention(tail, backend):
    grid = ODD_GRIDS["ragged"]
    q, k, v = random_qkv(grid, dtype=torch.float64)
    out = na.nabla_attention(q, k, v, grid, f"nabla-1_tail-{tail}", backend=backend)
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v), atol=1e-12, rtol=1e-12)


@tails
@backends_that_train
def test_blocks_of_one_token_are_dense_attention(tail, backend):
    # A block of one token has no spread, so the first order adds nothing.
    grid = na.TokenGrid(2, 3, 5)
    q, k, v = random_qkv(grid, dtype=torch.float64)
    config = na.parse(f"topk-0.2_block-1-1-1_tail-{tail}")
    out = na.nabla_attention(q, k, v, grid, config, backend=backend)
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v), atol=1e-12, rtol=1e-12)


@tails
@backends_that_train
def test_equal_keys_in_every_block_are_dense_attention(tail, backend):
    grid = na.TokenGrid(3, 11, 13)
    q, k, v = random_qkv(grid, dtype=torch.float64)
    blocks = block_of_tokens(grid)
    k = k[:, :, :: grid.num_tokens // grid.num_blocks][:, :, : grid.num_blocks][:, :, blocks]
    out = na.nabla_attention(q, k, v, grid, f"topk-0.1_tail-{tail}", backend=backend)
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v), atol=1e-12, rtol=1e-12)


@grids
@tails
@backends_that_train
def test_constant_values_come_out_constant(grid, tail, backend):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 2e-2)):
        q, k, v = random_qkv(grid, batch=2, dtype=dtype)
        v = v[:, :, :1].expand_as(v)
        out = na.nabla_attention(q, k, v, grid, f"topk-0.1_tail-{tail}", backend=backend)
        torch.testing.assert_close(out, v, atol=tolerance, rtol=tolerance)


@backends_that_train
def test_the_error_of_the_first_order_falls_with_the_square_of_the_spread(backend):
    # One matrix for all blocks is the derivative where tokens differ from the means of their
    # blocks as those of every other block do.
    grid = na.TokenGrid(4, 16, 16)
    shape = (1, 2, grid.num_blocks, grid.block.tokens, 16)
    q, centres, levels = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    away, values = (torch.randn(1, 2, 1, *shape[3:], dtype=torch.float64) for _ in range(2))
    q, centres, levels = q.flatten(2, 3), centres[:, :, :, :1], levels[:, :, :, :1]
    away = away - away.mean(dim=3, keepdim=True)
    v = (values + levels).flatten(2, 3)

    def error(spread, tail):
        k = (centres + spread * away).flatten(2, 3)
        raster = [na.to_raster(x, grid) for x in (q, k, v)]
        out = na.nabla_attention(*raster, grid, f"topk-0.1_tail-{tail}", backend=backend)
        return (out - scaled_dot_product_attention(*raster)).norm().item()

    assert error(0.02, "mean") / error(0.01, "mean") == pytest.approx(2, rel=0.1)
    assert error(0.02, "first") / error(0.01, "first") == pytest.approx(4, rel=0.1)


@tails
def test_no_summary_crosses_a_packed_clip(tail):
    grid = ODD_GRIDS["clips"]
    q, k, v = random_qkv(grid, dtype=torch.float64)
    config = na.parse(f"topk-0.3_tail-{tail}")
    for backend in ("reference", "gather"):
        packed = na.nabla_attention(q, k, v, grid, config, backend=backend)
        start = 0
        for frames in grid.segments:
            part = slice(start, start + frames * grid.height * grid.width)
            alone = replace(grid, frames=frames, segments=None)
            clip = (x[:, :, part] for x in (q, k, v))
            expected = na.nabla_attention(*clip, alone, config, backend=backend)
            torch.testing.assert_close(packed[:, :, part], expected, atol=1e-12, rtol=1e-12)
            start = part.stop


def test_a_tail_of_a_dense_algorithm_and_an_unknown_one_are_refused():
    with pytest.raises(ValueError, match="a tail needs a method"):
        na.parse("tail-first")
    with pytest.raises(ValueError, match=r"'tail-last' in .* Expected tail-mean or tail-first"):
        na.parse("nabla-0.5_tail-last")
    with pytest.raises(ValueError, match=r"unknown tail 'last'.*\('mean', 'first'\)"):
        na.SparseConfig(threshold=0.5, tail="last")


def test_summaries_are_counted_beside_the_kept_pairs():
    grid = ODD_GRIDS["exact"]
    q, k, v = random_qkv(grid)
    layout = TokenLayout(grid)

    _, plain = attend(q, k, v, layout, na.parse("topk-0.25"), measure=True)
    _, bmap = attend(q, k, v, layout, na.parse("topk-0.25_tail-mean"), measure=True)
    assert plain.tail_density is None and bmap.density == plain.density == 0.25
    torch.testing.assert_close(bmap.tail_density, torch.full((1, 2), 0.75 / 64))


@tails
@pytest.mark.parametrize(
    ("name", "dtype"), [("ragged", torch.bfloat16), ("clips", torch.float32)], ids=str
)
def test_flex_with_a_tail_within_the_budget(name, dtype, tail):
    inputs, out, formula = both(ODD_GRIDS[name], tail, "flex", dtype)
    assert_within_budget(out, formula(*(x.double() for x in inputs)), formula(*inputs))


@tails
def test_flex_with_taller_tiles_padded_text_and_a_tail(tail):
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, 4:] = False
    with flex_options(FlexOptions(tile_rows=2)):
        options = {"num_text": 9, "text_valid": valid}
        inputs, out, formula = both(ODD_GRIDS["ragged"], tail, "flex", torch.float32, **options)
    torch.testing.assert_close(out, formula(*inputs), atol=2e-5, rtol=1e-4)


def plain_flex(q, k, v, block_map, scale, tail, *, has_lse):
    """What `flex._run` computes, keys behind those of the map being summaries."""
    mask = block_map.mask.repeat_interleave(block_map.block_tokens, dim=-1)
    if block_map.kv_valid is not None:
        mask = mask & block_map.kv_valid[:, None, None]
    mask[..., -tail.bias.numel() :] &= tail.shown
    bias = torch.nn.functional.pad(tail.bias, (k.shape[2] - tail.bias.numel(), 0))
    scores = scale * q @ k.mT + bias
    rows = mask.repeat_interleave(block_map.block_tokens, dim=2)
    weights = scores.exp().masked_fill(~rows, 0)
    total = weights.sum(-1, keepdim=True)
    return weights @ v / total.clamp_min(1e-300), total.squeeze(-1).log() if has_lse else None


@pytest.mark.parametrize("num_text", [0, 9])
@pytest.mark.parametrize("name", ["ragged", "clips"])
def test_two_log_sum_exps_give_the_probability_of_summaries(name, num_text, monkeypatch):
    grid, scale = ODD_GRIDS[name], 0.3
    layout = TokenLayout(grid, 0, num_text)
    q, k, v = (
        na.to_blocks(x, layout).requires_grad_()
        for x in random_qkv(grid, num_text=num_text, dtype=torch.float64)
    )
    select = {"text_after": num_text}
    raster = [na.to_raster(x, layout) for x in (q, k)]
    block_map = na.build_block_map(*raster, grid, "nabla-0.3", **select)
    tail = build_tail(k, v, block_map, layout, "first")
    monkeypatch.setattr(flex, "_run", plain_flex)
    by_lse = flex._with_mass_by_lse(q, k, v, block_map, scale, tail)
    args = (*with_summaries(k, v, block_map, tail), scale, tail)
    out, _ = plain_flex(q, *args, has_lse=False)
    marked = torch.ones_like(args[1]).cumsum(dim=2) > k.shape[2]
    mass, _ = plain_flex(q, args[0], marked.double(), *args[2:], has_lse=False)
    expected = (out, mass[..., 0])
    torch.testing.assert_close(by_lse, expected)
    grads = [torch.randn_like(x) for x in expected]
    got = torch.autograd.grad(by_lse, (q, k, v), grads, retain_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(expected, (q, k, v), grads))


@pytest.mark.parametrize("name", ["ltx", "hunyuan"])
def test_models_run_compile_train_and_report_with_a_tail(name):
    model, inputs = TINY[name].build(), TINY[name].inputs(3, 16, 16)
    with torch.no_grad(), na.apply(model, "topk-0.1"):
        dropped = run(model, inputs)
    handle = na.apply(model, "topk-0.1_tail-first")
    with torch.no_grad():
        expected = run(model, inputs)
        assert relative_error(dropped, expected) > 1e-4
        numbers = handle.report().to_dict()
        assert 0 < numbers["tail_density"] < (1 - numbers["density"]) / 64 * 1.2
        assert "of summaries" in str(handle.report())
    run(model, inputs).square().sum().backward()
    eager = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    torch._dynamo.reset()
    for layer in handle.layers:
        block = model.get_submodule(layer.path.rpartition(".")[0])
        block.compile(fullgraph=True, backend="aot_eager")
    out = run(model, inputs)
    assert relative_error(out.detach(), expected) < 3e-6
    out.square().sum().backward()
    compiled = [p.grad for p in model.parameters() if p.grad is not None]
    for ours, truth in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, truth, atol=1e-4, rtol=1e-3)
    torch._dynamo.reset()


@tails
def test_a_kept_map_serves_with_summaries_of_the_current_tokens(tail):
    grid = ODD_GRIDS["exact"]
    first, now = random_qkv(grid, batch=2), random_qkv(grid, batch=2)
    config, layout = na.parse(f"topk-0.2_tail-{tail}"), TokenLayout(grid)
    kept = na.build_block_map(*first[:2], grid, config)

    out, _ = attend(*now, layout, config, select=lambda *args, **options: kept)
    expected = estimated_attention(*now, grid, kept, tail)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


@tails
@pytest.mark.parametrize("num_text", [0, 9])
def test_losses_of_a_map_count_its_tail(tail, num_text):
    grid, config = ODD_GRIDS["ragged"], na.parse(f"topk-0.2_tail-{tail}")
    q, k, v = random_qkv(grid, num_text=num_text)
    layout = TokenLayout(grid, 0, num_text)
    bmap = na.build_block_map(q, k, grid, config, text_after=num_text)
    blocks = [na.to_blocks(x, layout) for x in (q, k, v)]
    call = BlockCall(*blocks, layout, bmap, q.shape[-1] ** -0.5, tail)
    exact = scaled_dot_product_attention(q, k, v)
    wanted = estimated_attention(q, k, v, grid, bmap, tail, num_text=num_text)
    wanted = ((wanted - exact).norm(dim=-1) / exact.norm(dim=-1))[0, :, : grid.num_tokens].mean(-1)
    for max_scores in (1, losses.MAX_SCORES):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(losses, "MAX_SCORES", max_scores)
            got = losses.measure_losses(call, num_rows=10_000)
        torch.testing.assert_close(got.output_error, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@tails
def test_autocast_acts_as_on_scaled_dot_product_attention(tail, dtype):
    grid = ODD_GRIDS["ragged"]
    q, k, v = random_qkv(grid)
    exact = na.nabla_attention(q, k, v, grid, f"topk-0.2_tail-{tail}")
    with torch.autocast("cpu", dtype=dtype):
        out = na.nabla_attention(q, k, v.to(dtype), grid, f"topk-0.2_tail-{tail}")
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), exact, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("heads", [1, 3, 4])
@backends_that_train
def test_panels_of_heads_do_not_change_a_tail(heads, backend, monkeypatch):
    grid = ODD_GRIDS["clips"]
    q, k, v = (x.requires_grad_() for x in random_qkv(grid, batch=2, heads=4, dtype=torch.float64))
    run = partial(na.nabla_attention, grid=grid, config="topk-0.2_tail-first", backend=backend)
    whole, grad = run(q, k, v), torch.randn_like(q)
    grads = torch.autograd.grad(whole, (q, k, v), grad)
    slots = na.to_blocks(k, grid)[:, 0].numel()
    for module in (gather, tail_room):
        monkeypatch.setattr(module, "PANEL_VALUES", heads * slots)
    panels = run(q, k, v)
    torch.testing.assert_close(panels, whole, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(panels, (q, k, v), grad), grads)
    with torch.no_grad():
        torch.testing.assert_close(run(q, k, v), whole, atol=1e-12, rtol=1e-12)


def test_a_tail_of_more_heads_copies_no_more_tokens(monkeypatch):
    grid, dim = na.TokenGrid(6, 17, 40), 64
    for module in (gather, tail_room):
        monkeypatch.setattr(module, "PANEL_VALUES", grid.num_slots * dim)
    monkeypatch.setattr(workers, "MAX_WORKERS", 1)

    def peak(heads, algorithm):
        q, k, v = random_qkv(grid, heads=heads, dim=dim, dtype=torch.bfloat16)
        run = partial(na.nabla_attention, q, k, v, grid, algorithm, backend="gather")
        run()  # tables are cached
        return measure_peak(run)

    few, many = (peak(n, "topk-0.1_tail-first") - peak(n, "topk-0.1") for n in (2, 32))
    # What grows with the heads: a bool for each pair of blocks, and the summaries in fp32.
    pairs, summaries = grid.num_blocks**2, 2 * grid.num_blocks * dim
    slopes = dim * dim
    assert many - few <= 30 * (2 * pairs + 8 * summaries + 8 * slopes)
    assert many < 32 * grid.num_slots * dim  # half a copy of the keys
