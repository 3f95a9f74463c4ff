"""Every model class under autocast: sparse attention runs wherever the dense one does."""

import pytest
import torch
from tests.models.tiny_models import TINY, relative_error, run

import nabla_attn as na


@pytest.mark.parametrize("name", TINY)
def test_forward_and_backward_under_autocast(name):
    model, inputs = TINY[name].build(), TINY[name].inputs(2, 8, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            dense = run(model, inputs)
            with na.apply(model, "nabla-1"):
                assert relative_error(run(model, inputs).float(), dense.float()) < 0.03
        with na.apply(model, "nabla-0.5") as handle:
            run(model, inputs).float().square().mean().backward()
            assert 0 < handle.report().mean_density <= 1
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert gradients.isfinite().all() and gradients.any()


@pytest.mark.parametrize(
    "name",
    ["wan", *(pytest.param(name, marks=pytest.mark.slow) for name in ("hunyuan", "cogvideox"))],
)
def test_compiled_blocks_under_autocast(name):
    model, inputs = TINY[name].build(), TINY[name].inputs(2, 8, 16)
    handle = na.apply(model, "nabla-0.5")

    def outputs():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = run(model, inputs)
        gradients = torch.autograd.grad(
            out.float().square().mean(), list(model.parameters()), allow_unused=True
        )
        return out.float(), torch.cat([g.flatten() for g in gradients if g is not None])

    expected = outputs()
    torch._dynamo.reset()
    for layer in handle.layers:
        block = model.get_submodule(layer.path.rpartition(".")[0])
        block.compile(fullgraph=True, backend="aot_eager")
    for compiled, eager in zip(outputs(), expected, strict=True):
        assert relative_error(compiled, eager) < 0.03
    torch._dynamo.reset()


@pytest.mark.parametrize("is_autocast", [False, True])
@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_models_in_float64(name, is_autocast):
    model, inputs = TINY[name].build().double(), TINY[name].inputs(2, 8, 16)
    inputs = {
        key: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in inputs.items()
    }
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast), torch.no_grad():
        dense = run(model, inputs)
        with na.apply(model, "nabla-1"):
            ours = run(model, inputs)
    assert ours.dtype == dense.dtype
    assert relative_error(ours.double(), dense.double()) < (0.03 if is_autocast else 1e-9)
