"""Every backend against float64: dtypes, odd grids, text, forward, backward, compiled."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.oracle import ODD_GRIDS, masked_attention, random_qkv, token_mask
from torch.nn.attention.flex_attention import flex_attention

import nabla_attn as na
from nabla_attn import backends
from nabla_attn.backends import gather
from nabla_attn.core.order import TokenLayout

grids = pytest.mark.parametrize("grid", ODD_GRIDS.values(), ids=ODD_GRIDS.keys())


def assert_within_budget(got, exact, low_precision):
    """At most twice the error of an independent run in the same dtype, plus one rounding."""
    budget = 2 * (low_precision.double() - exact).abs().max()
    budget += torch.finfo(got.dtype).eps * exact.abs().max()
    error = (got.double() - exact).abs().max()
    assert error <= budget, f"error {error:.3e} above the budget {budget:.3e}"


def low_precision_attention(q, k, v, mask):
    """The same maths in the inputs' own dtype, rounded after every operation."""
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v


def run(grid, backend, dtype, *, config="nabla-0.5", batch=2, num_text=0, text_valid=None):
    q, k, v = random_qkv(grid, batch=batch, num_text=num_text, dtype=dtype)
    inputs = [x.requires_grad_(backend != "flex") for x in (q, k, v)]
    options = {"text_after": num_text, "text_valid": text_valid}
    config = na.parse(config)
    out = na.nabla_attention(*inputs, grid, config, backend=backend, **options)
    bmap = na.build_block_map(q, k, grid, config, **options)
    return inputs, out, token_mask(bmap, TokenLayout(grid, 0, num_text))


@grids
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "gather"])
def test_forward_and_backward_within_the_budget(grid, dtype, backend):
    inputs, out, mask = run(grid, backend, dtype)
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, inputs, grad)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact_out = masked_attention(*exact_inputs, mask)
    exact = torch.autograd.grad(exact_out, exact_inputs, grad.double())
    low_inputs = [x.detach().clone().requires_grad_() for x in inputs]
    low_out = low_precision_attention(*low_inputs, mask)
    low = torch.autograd.grad(low_out, low_inputs, grad)
    assert_within_budget(out, exact_out, low_out)
    for ours, truth, reference in zip(got, exact, low, strict=True):
        assert_within_budget(ours, truth, reference)


@pytest.mark.parametrize("backend", ["reference", "gather"])
@pytest.mark.parametrize("name", ["ragged", "clips"])
def test_gradients_equal_float64_numerics(name, backend):
    grid = ODD_GRIDS[name]
    q, k, v = random_qkv(grid, heads=1, dim=4, dtype=torch.float64)
    bmap = na.build_block_map(q, k, grid, na.parse("nabla-0.5"))
    order = [na.to_blocks(x, grid).requires_grad_() for x in (q, k, v)]
    attend = backends.resolve(backend, *order)
    torch.autograd.gradcheck(
        lambda *x: na.to_raster(attend(*x, bmap), grid), order, fast_mode=True, atol=1e-6
    )


@pytest.mark.parametrize("backend", ["reference", "gather"])
@pytest.mark.parametrize("name", ["exact", "ragged"])
def test_joint_text_with_padding_per_sample(name, backend):
    valid = torch.ones(3, 9, dtype=torch.bool)
    valid[1, 4:] = False
    valid[2, 1:] = False
    grid = ODD_GRIDS[name]
    inputs, out, mask = run(grid, backend, torch.float32, batch=3, num_text=9, text_valid=valid)
    torch.testing.assert_close(out.double(), masked_attention(*inputs, mask), atol=2e-5, rtol=0)
    grad_k = torch.autograd.grad(out.sum(), inputs[1])[0]
    assert (grad_k[2, :, -8:] == 0).all()


@given(seed=st.integers(0, 99), max_bytes=st.sampled_from([1, 2**15, 2**24]))
@settings(max_examples=15, deadline=None)
def test_gather_does_not_depend_on_its_scratch_size(seed, max_bytes):
    torch.manual_seed(seed)
    grid = na.TokenGrid(3, 9, 16)
    inputs = random_qkv(grid, batch=2)
    expected = na.nabla_attention(*inputs, grid, na.parse("nabla-0.4"), backend="gather")
    before = gather.CPU_BYTES_PER_THREAD
    gather.CPU_BYTES_PER_THREAD = max_bytes
    try:
        out = na.nabla_attention(*inputs, grid, na.parse("nabla-0.4"), backend="gather")
    finally:
        gather.CPU_BYTES_PER_THREAD = before
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dim", [64, 128])
def test_gather_in_float16_takes_products_beyond_its_range(dim):
    grid = na.TokenGrid(2, 16, 16)
    q = 32 * torch.randn(1, 2, grid.num_tokens, dim)
    k, v = q + torch.randn_like(q), torch.randn_like(q)
    q, k, v = (x.half().requires_grad_() for x in (q, k, v))
    products = (q.double() @ k.double().mT).abs().max()
    assert 65_504 < products < 65_504 * dim**0.5
    out = na.nabla_attention(q, k, v, grid, na.parse("nabla-1"), backend="gather")
    exact = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in (q, k, v)))
    torch.testing.assert_close(out.double(), exact, atol=2e-2, rtol=0)
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("name", ["exact", "ragged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flex_within_the_budget(name, dtype):
    inputs, out, mask = run(ODD_GRIDS[name], "flex", dtype)
    low = low_precision_attention(*inputs, mask)
    assert_within_budget(out, masked_attention(*inputs, mask), low)


def test_flex_does_not_recompile_when_the_threshold_changes():
    grid = ODD_GRIDS["ragged"]
    run(grid, "flex", torch.float32)
    with torch._dynamo.config.patch(error_on_recompile=True):
        inputs, out, mask = run(grid, "flex", torch.float32, config="nabla-0.9")
    torch.testing.assert_close(out.double(), masked_attention(*inputs, mask), atol=2e-5, rtol=0)


def test_an_explicit_backend_never_falls_back():
    grid = ODD_GRIDS["one-block"]
    q, k, v = (x.requires_grad_() for x in random_qkv(grid))
    with pytest.raises(RuntimeError, match=r"flex.*no backward on CPU.*gather"):
        na.nabla_attention(q, k, v, grid, na.parse("nabla-0.5"), backend="flex")
    with pytest.raises(ValueError, match="unknown backend 'flux'; expected one of"):
        na.nabla_attention(q, k, v, grid, na.parse("nabla-0.5"), backend="flux")


def test_flex_says_when_no_compiler_is_there(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "C++ compiler" in backends.available()["flex"]
    assert backends.available()["gather"] is None


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_uncompiled_flex_would_be_dense_attention():
    # This is why the backend insists on a compiler.
    grid = ODD_GRIDS["ragged"]
    q, k, v = random_qkv(grid, batch=1)
    bmap = na.build_block_map(q, k, grid, na.parse("nabla-0.3"))
    blocks = [na.to_blocks(x, grid) for x in (q, k, v)]
    out = flex_attention(*blocks, block_mask=bmap.to_block_mask())
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(na.to_raster(out, grid), dense, atol=1e-5, rtol=0)


def test_flex_never_runs_uncompiled():
    grid = ODD_GRIDS["one-block"]
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.raises(RuntimeError, match=r"switched off here.*Use backend='gather'"),
    ):
        run(grid, "flex", torch.float32)
    with torch._dynamo.config.patch(disable=True):
        assert "switched off (TORCHDYNAMO_DISABLE)" in backends.available()["flex"]


def test_flex_refuses_devices_without_a_kernel():
    assert "there is no compiled kernel for meta" in backends.available("meta")["flex"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), "must share one shape"),
        (lambda q, k, v: (q, k[:, :1], v), "must share one shape"),
        (lambda q, k, v: (q, k, v.double()), "must share one floating dtype"),
        (lambda q, k, v: (q.int(), k.int(), v.int()), "must share one floating dtype"),
    ],
)
def test_bad_inputs_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        backends.resolve("auto", *change(*random_qkv(ODD_GRIDS["one-block"])))


def test_flex_serves_more_variants_than_the_compilers_default_limit():
    # scale is a constant of the graph, so each value is a variant.
    grid = ODD_GRIDS["one-block"]
    q, k, v = random_qkv(grid, heads=1)
    with torch._dynamo.config.patch(recompile_limit=1):
        for scale in (0.5, 0.25):
            out = na.nabla_attention(q, k, v, grid, na.parse("dense"), backend="flex", scale=scale)
            expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
