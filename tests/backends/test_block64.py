"""Kernels of other packages: called as their sources say, and refused with the reason elsewhere.

The packages here are stand-ins with the recorded calling convention, in plain torch.
"""

import subprocess
import sys
from importlib.machinery import ModuleSpec
from math import sqrt
from types import ModuleType

import pytest
import torch
from tests.oracle import ODD_GRIDS, random_qkv

import nabla_attn as na
from nabla_attn import backends
from nabla_attn.backends import block64, reference
from nabla_attn.core.order import TokenLayout, to_blocks

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BLOCK = 64


def attend_by_index(q, k, v, index, counts, sizes, scale):
    """Attention over the first `counts` of the indexed key blocks, and their first tokens."""
    batch, heads, slots, _ = q.shape
    assert index.dtype == counts.dtype == sizes.dtype == torch.int32
    assert index.is_contiguous() and counts.is_contiguous() and sizes.is_contiguous()
    assert index.shape[:3] == counts.shape == (batch, heads, slots // BLOCK)
    assert sizes.shape == (k.shape[2] // BLOCK,)
    out = torch.zeros_like(q)
    for b, h, row in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
        blocks = index[b, h, row, : counts[b, h, row]].long()
        assert (sizes[blocks] > 0).all(), "a row of minus infinity"
        tokens = torch.cat([x * BLOCK + torch.arange(sizes[x]) for x in blocks])
        rows = slice(row * BLOCK, row * BLOCK + BLOCK)
        probs = (scale * q[b, h, rows] @ k[b, h, tokens].T).softmax(-1)
        out[b, h, rows] = probs @ v[b, h, tokens]
    return out


def from_indices(q, k, v, q2k_idx, q2k_num, variable_block_sizes):
    """fastvideo_kernel.block_sparse_attn_from_indices."""
    assert all(x.is_contiguous() for x in (q, k, v))
    out = attend_by_index(q, k, v, q2k_idx, q2k_num, variable_block_sizes, 1 / sqrt(q.shape[-1]))
    return out, out.new_empty(out.shape[:3])


def blk64(
    q,
    k,
    v,
    q2k_block_index,
    block_sparse_num,
    block_sizes=None,
    q2k_block_nums=None,
    softmax_scale=None,
    return_lse=False,
):
    """flashinfer.cute_dsl.sparse's kernel: tokens before heads."""
    assert block_sparse_num >= 1 and q2k_block_nums is not None
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = attend_by_index(q, k, v, q2k_block_index, q2k_block_nums, block_sizes, softmax_scale)
    return out.transpose(1, 2), None


@pytest.fixture
def packages(monkeypatch):
    """Both packages, flashinfer's kernel under the name that it has from 0.6.18 on."""

    def add(name, **functions):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)

    add("fastvideo_kernel", block_sparse_attn_from_indices=from_indices)
    for name in ("flashinfer", "flashinfer.cute_dsl", "flashinfer.cute_dsl.sparse"):
        add(name)
    add("flashinfer.cute_dsl.sparse.bsa_attn_sm100_blk64", bsa_attn_sm100_blk64_fwd=blk64)
    return add


def inputs(grid, num_text=0, batch=2):
    layout = TokenLayout(grid, 0, num_text)
    raster = random_qkv(grid, batch=batch, num_text=num_text)
    bmap = na.build_block_map(*raster[:2], grid, "nabla-0.5", text_after=num_text)
    return [to_blocks(x, layout) for x in raster], bmap, layout


def tokens_of(x, layout):
    is_token = to_blocks(torch.ones(layout.num_tokens, 1), layout, dim=0)[:, 0] > 0
    return x[:, :, is_token]


@pytest.mark.parametrize("grid", [*ODD_GRIDS.values(), na.TokenGrid(3, 20, 24)], ids=str)
@pytest.mark.parametrize("name", backends.OTHERS)
def test_kernels_are_handed_the_map(packages, name, grid):
    if grid.block.tokens != BLOCK:
        grid = grid.with_block((1, 8, 8))
    qkv, bmap, layout = inputs(grid, num_text=5)
    out = block64.KERNELS[name].attend(*qkv, bmap)
    expected = reference.attend(*qkv, bmap)
    torch.testing.assert_close(tokens_of(out, layout), tokens_of(expected, layout))


def test_gradients_reach_queries_keys_and_values(packages):
    qkv, bmap, _ = inputs(na.TokenGrid(1, 16, 16), batch=1)
    leaves = [x.requires_grad_() for x in qkv]
    grad = torch.randn_like(leaves[0])
    found, expected = (
        torch.autograd.grad(attend(*leaves, bmap), leaves, grad)
        for attend in (block64.KERNELS["fastvideo"].attend, reference.attend)
    )
    torch.testing.assert_close(found, expected)


def test_the_older_name_of_the_kernel_is_found(packages, monkeypatch):
    monkeypatch.delitem(sys.modules, "flashinfer.cute_dsl.sparse.bsa_attn_sm100_blk64")
    packages("flashinfer.cute_dsl.sparse", bsa_attn_blk64_fwd=blk64)
    qkv, bmap, _ = inputs(na.TokenGrid(2, 16, 16))
    out = block64.KERNELS["flashinfer"].attend(*qkv, bmap, scale=0.3)
    torch.testing.assert_close(out, reference.attend(*qkv, bmap, scale=0.3))


def test_a_block_without_valid_keys_is_left_out(packages):
    # A sequence whose text is padding throughout would be a row of minus infinity.
    grid = na.TokenGrid(1, 8, 16)
    q, k, v = random_qkv(grid, batch=1, num_text=5)
    valid = torch.zeros(1, 5, dtype=torch.bool)
    bmap = na.build_block_map(q, k, grid, "nabla-0.5", text_after=5, text_valid=valid)
    layout = TokenLayout(grid, 0, 5)
    qkv = [to_blocks(x, layout) for x in (q, k, v)]
    out = block64.KERNELS["fastvideo"].attend(*qkv, bmap)
    expected = reference.attend(*qkv, bmap)
    torch.testing.assert_close(tokens_of(out, layout), tokens_of(expected, layout))


def test_calls_that_they_cannot_hold_are_refused(packages):
    qkv, bmap, _ = inputs(na.TokenGrid(2, 16, 16))
    kernel = block64.KERNELS["fastvideo"]
    with pytest.raises(RuntimeError, match="scales by"):
        kernel.attend(*qkv, bmap, scale=0.3)
    own = bmap.__class__(bmap.mask, bmap.q_counts, torch.ones(2, 512).bool(), bmap.block_tokens)
    with pytest.raises(RuntimeError, match="valid in some samples"):
        kernel.attend(*qkv, own)


@pytest.mark.parametrize("name", backends.OTHERS)
def test_reasons(packages, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    bf16, fp16 = torch.bfloat16, torch.float16

    def why_not(device=CUDA, **facts):
        return backends.why_not(name, device, **facts)

    assert why_not(dtype=bf16, head_dim=128, block_tokens=64) is None
    assert "CUDA only" in why_not(CPU)
    assert "takes bfloat16: got torch.float16" in why_not(dtype=fp16)
    assert "got 96" in why_not(head_dim=96)
    assert "blocks of 64 tokens: got 128" in why_not(block_tokens=128)
    assert "_tail-mean" in why_not(tail="mean")
    assert "padded text" in why_not(is_text_padded=True)
    has_backward = {"fastvideo": True, "flashinfer": False}[name]
    assert (why_not(needs_grad=True) is None) == has_backward
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    older = {"fastvideo": "sm_80 or later", "flashinfer": "needs sm_100 or sm_103: got sm_75"}
    assert older[name] in why_not()


def test_what_is_not_installed_is_named_and_never_chosen(monkeypatch):
    monkeypatch.setattr(block64, "find_spec", lambda name: None)
    found = backends.available("cpu")
    assert found["fastvideo"].endswith("(pip install fastvideo-kernel)")
    assert found["flashinfer"].endswith("(pip install flashinfer-python)")
    grid = na.TokenGrid(1, 8, 16)
    with pytest.raises(RuntimeError, match="fastvideo-kernel is not installed"):
        na.nabla_attention(*random_qkv(grid), grid, "nabla-0.5", backend="fastvideo")


def test_nothing_imports_them_unasked():
    code = (
        "import sys; from importlib.abc import MetaPathFinder\n"
        "class Finder(MetaPathFinder):\n"
        "    def find_spec(self, name, *_):\n"
        "        assert ASKED or not name.startswith(('fastvideo_kernel', 'flashinfer')), name\n"
        "ASKED = False; sys.meta_path.insert(0, Finder())\n"
        "import torch, nabla_attn as na\n"
        "grid = na.TokenGrid(1, 8, 16); x = torch.randn(1, 1, 128, 16)\n"
        "na.nabla_attention(x, x, x, grid, 'nabla-0.5')\n"
        "ASKED = True; from nabla_attn import backends; backends.available('cpu')\n"
        "assert not {'fastvideo_kernel', 'flashinfer'} & set(sys.modules)\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
