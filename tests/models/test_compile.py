"""Blocks of every model compile as full graphs with NABLA inside, ports included."""

import pytest
import torch
from tests.models.tiny_models import TINY, relative_error, run
from torch._dynamo.utils import counters

import nabla_attn as na

# Two doors, with and without text, and a port of each kind; all others are slow.
QUICK = ("ltx", "hunyuan", "cogvideox", "mochi", "kandinsky6-sr")
CASES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow, id=name) for name in TINY
]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_blocks_compile_as_full_graphs(name):
    model, inputs = TINY[name].build(), TINY[name].inputs(3, 16, 16)
    handle = na.apply(model, "nabla-0.5")
    expected = run(model, inputs)
    torch._dynamo.reset()
    counters.clear()
    for layer in handle.layers:
        model.get_submodule(layer.path.rpartition(".")[0]).compile(
            fullgraph=True, backend="aot_eager"
        )
    compiled = run(model, inputs)
    graphs = counters["stats"]["unique_graphs"]
    with na.apply(model, "nabla-0.3_sta-1-1-1"):
        run(model, inputs | {"timestep": inputs["timestep"] - 100})
    assert relative_error(compiled, expected) < 3e-6
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]
    torch._dynamo.reset()
