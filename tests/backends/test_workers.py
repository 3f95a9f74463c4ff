import threading

import pytest
import torch
from tests.oracle import ODD_GRIDS, random_qkv

import nabla_attn as na
from nabla_attn.backends.workers import for_each, num_workers

CPU = torch.device("cpu")


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 3, 20])
def test_every_piece_is_done_once_and_the_threads_come_back(set_threads, threads):
    set_threads(threads)
    done = torch.zeros(50)
    for_each(lambda piece, _: done[piece].add_(1), range(50), CPU)
    assert (done == 1).all()
    assert torch.get_num_threads() == threads


def test_work_is_shared_and_each_worker_has_its_part_of_the_threads(set_threads):
    set_threads(3)
    assert num_workers(CPU) == 3 and num_workers(torch.device("meta")) == 1
    meet, seen = threading.Barrier(3, timeout=60), []

    def piece(_, __):
        meet.wait()
        seen.append((torch.get_num_threads(), torch.is_grad_enabled()))

    for_each(piece, range(3), CPU)
    assert seen == [(1, False)] * 3


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_ends_the_rest_and_is_raised(set_threads, threads):
    set_threads(threads)
    done = []

    def piece(index, _):
        if index == 3:
            raise IndexError("of the piece")
        done.append(index)

    with pytest.raises(IndexError, match="of the piece"):
        for_each(piece, range(10_000), CPU)
    assert len(done) < 10_000
    assert torch.get_num_threads() == threads


def gradients(inputs, grid):
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = na.nabla_attention(*inputs, grid, na.parse("nabla-0.4"), backend="gather")
    return [out, *torch.autograd.grad(out.square().sum(), inputs)]


@pytest.mark.parametrize("name", ["ragged", "clips"])
def test_gather_gives_the_same_bytes_whatever_runs_side_by_side(set_threads, name):
    grid = ODD_GRIDS[name]
    inputs = random_qkv(grid, batch=3)
    set_threads(3)
    expected = gradients(inputs, grid)
    for _ in range(3):
        assert all(map(torch.equal, gradients(inputs, grid), expected))
    set_threads(1)
    for alone, together in zip(gradients(inputs, grid), expected, strict=True):
        torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)


def test_gather_works_on_inference_tensors(set_threads):
    set_threads(3)
    grid = ODD_GRIDS["exact"]
    inputs = random_qkv(grid)
    config = na.parse("nabla-0.4")
    expected = na.nabla_attention(*inputs, grid, config, backend="gather")
    with torch.inference_mode():
        out = na.nabla_attention(*(x.clone() for x in inputs), grid, config, backend="gather")
    assert torch.equal(out, expected)
