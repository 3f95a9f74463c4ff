"""One applied model in several threads: every call has a plan of its own."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tests.models.tiny_models import TINY, run

import nabla_attn as na

# Equal numbers of tokens, so that no shape tells one grid from the other.
GRIDS = ((2, 16, 16), (8, 8, 8))


def calls(name):
    return [TINY[name].inputs(*grid) for grid in GRIDS]


def in_threads(work, count=2):
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


@pytest.mark.parametrize("name", ["wan", "hunyuan", "cogvideox"])
@pytest.mark.parametrize("algorithm", ["nabla-0.3", "nabla-0.3_sta-1-3-3"])
@torch.no_grad()
def test_threads_do_not_see_each_other(name, algorithm):
    model = TINY[name].build()
    na.apply(model, algorithm)
    expected = [run(model, inputs) for inputs in calls(name)]

    @torch.no_grad()
    def work(index):
        inputs = calls(name)[index]
        return [torch.equal(run(model, inputs), expected[index]) for _ in range(15)]

    assert all(all(equal) for equal in in_threads(work))


@torch.no_grad()
def test_compiled_blocks_in_threads():
    model = TINY["wan"].build()
    na.apply(model, "nabla-0.3")
    expected = [run(model, inputs) for inputs in calls("wan")]
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    for inputs in calls("wan"):
        run(model, inputs)

    @torch.no_grad()
    def work(index):
        inputs = calls("wan")[index]
        return [(run(model, inputs) - expected[index]).abs().max() < 1e-5 for _ in range(10)]

    assert all(all(close) for close in in_threads(work))
    torch._dynamo.reset()


@torch.no_grad()
def test_training_and_inference_in_threads():
    model = TINY["wan"].build()
    model.enable_gradient_checkpointing()
    na.apply(model, "nabla-0.3", backend="gather")
    inputs, other = calls("wan")

    def gradients():
        with torch.enable_grad():
            loss = run(model, inputs).square().mean()
            return [g.clone() for g in torch.autograd.grad(loss, list(model.parameters()))]

    model.train()
    expected = gradients()
    stop = threading.Event()

    @torch.no_grad()
    def disturb():
        while not stop.is_set():
            run(model, other)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for _ in range(5):
            assert all(map(torch.equal, gradients(), expected))
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("rules", [{"dense_first_steps": 1}, {"reuse_steps": 2}], ids=str)
@torch.no_grad()
def test_steps_of_two_threads_are_not_mixed(rules):
    model = TINY["wan"].build()
    na.apply(model, schedule=na.Schedule(algorithm=na.parse("nabla-0.5"), **rules))

    def at(time):
        inputs = TINY["wan"].inputs(2, 8, 8) | {"timestep": torch.full((2,), float(time))}
        with torch.no_grad():
            return run(model, inputs)

    at(900)
    at(800)
    with ThreadPoolExecutor(1) as elsewhere:
        # A generation of its own may follow in any thread.
        for time in (900, 800):
            elsewhere.submit(at, time).result()
        with pytest.raises(ValueError, match="another thread is in the middle of a generation"):
            at(700)
