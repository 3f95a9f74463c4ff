"""Every model class: exact at threshold 1, different below, restored, differentiable, copyable."""

import copy

import pytest
import torch
from tests.models.tiny_models import TINY, relative_error, run

import nabla_attn as na
from nabla_attn.models import remove

WHOLE, RAGGED = (3, 16, 16), (3, 11, 13)
# Its own forward raises unless blocks fill the grid; its own processor is sparse.
SR = "kandinsky6-sr"
CASES = [(name, grid) for name in TINY for grid in (WHOLE, RAGGED) if (name, grid) != (SR, RAGGED)]


@pytest.fixture(scope="module")
def models():
    built = {}

    def get(name):
        if name not in built:
            built[name] = TINY[name].build()
        return built[name]

    return get


def dense_output(model, name, inputs):
    """What the model itself computes, densely."""
    if name != SR:
        return run(model, inputs)
    with na.apply(model, "dense"):
        return run(model, inputs)


@pytest.mark.parametrize(("name", "grid"), CASES)
@torch.no_grad()
def test_threshold_one_is_dense_and_remove_restores(models, name, grid):
    model, inputs = models(name), TINY[name].inputs(*grid)
    before = None if name == SR else run(model, inputs)
    dense = dense_output(model, name, inputs)
    handle = na.apply(model, "nabla-1")
    assert relative_error(run(model, inputs), dense) < 3e-6
    assert handle.report().mean_density == 1
    na.apply(model, "nabla-0.5")
    assert relative_error(run(model, inputs), dense) > 1e-3
    remove(model)
    if before is not None:
        assert torch.equal(run(model, inputs), before)


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_copies_and_two_models_share_nothing(models, name):
    model, inputs = models(name), TINY[name].inputs(*WHOLE)
    dense = dense_output(model, name, inputs)
    handle = na.apply(model, "nabla-0.5")
    sparse = run(model, inputs)
    other = copy.deepcopy(model)
    handle.remove()
    assert torch.equal(run(other, inputs), sparse)
    na.apply(model, "nabla-1")
    assert relative_error(run(model, inputs), dense) < 3e-6
    assert torch.equal(run(other, inputs), sparse)
    remove(model)


@pytest.mark.parametrize("name", ["wan", "hunyuan", "hunyuan15", "mochi", "ltx"])
@torch.no_grad()
def test_each_sample_has_a_map_of_its_own(models, name):
    model, inputs = models(name), TINY[name].inputs(*RAGGED)
    alone = [
        {k: v[i : i + 1] if torch.is_tensor(v) else v for k, v in inputs.items()} for i in range(2)
    ]
    with na.apply(model, "nabla-0.4"):
        both = run(model, inputs)
        for sample, own in zip(both, alone, strict=True):
            assert relative_error(run(model, own)[0], sample) < 3e-6


@pytest.mark.parametrize("name", TINY)
def test_gradients_flow(models, name):
    model = copy.deepcopy(models(name)).requires_grad_(False)
    inputs = TINY[name].inputs(*(WHOLE if name == SR else RAGGED))
    latents = inputs["hidden_states"].requires_grad_()
    gradients = []
    for algorithm in ("dense", "nabla-1", "nabla-0.5"):
        with na.apply(model, algorithm):
            run(model, inputs).square().mean().backward()
        gradients.append(latents.grad)
        latents.grad = None
    dense, full, sparse = gradients
    assert relative_error(full, dense) < 2e-5
    assert sparse.isfinite().all() and relative_error(sparse, dense) > 1e-4


# One frame, small and at 1280x720; a length four times the native; and odd shapes.
@pytest.mark.parametrize("grid", [(1, 11, 13), (1, 45, 80), (12, 5, 7), (1, 3, 2), (2, 1, 40)])
@pytest.mark.parametrize("name", ["wan", "hunyuan", "cogvideox"])
@torch.no_grad()
def test_any_size(models, name, grid):
    model, inputs = models(name), TINY[name].inputs(*grid)
    dense = run(model, inputs)
    with na.apply(model, "nabla-1"):
        assert relative_error(run(model, inputs), dense) < 3e-6
    with na.apply(model, "nabla-0.3_sta-3-1-1_keep-first-frame"):
        assert run(model, inputs).isfinite().all()
