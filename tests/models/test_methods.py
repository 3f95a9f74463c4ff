"""What methods are told in a model: step, layer, memory of a generation, tables."""

import pytest
import torch
from tests.models.test_map_reuse import WAN, at
from tests.models.tiny_models import run

import nabla_attn as na
from nabla_attn import methods


@pytest.fixture
def seen(monkeypatch):
    """What a method with needs was told, call by call."""
    monkeypatch.setattr(methods, "_OWN", {})
    calls = []

    @na.register_method("watch", needs=("step", "layer", "memory", "table"))
    def watch(q, k, grid, params, state):
        times = state.memory["times"] = state.memory.get("times", 0) + 1
        calls.append((state.step, state.layer, times, state.table))
        return torch.ones(1, 1, grid.num_blocks, grid.num_blocks, dtype=torch.bool)

    return calls


def watching(entries):
    return na.Schedule(algorithm=na.parse("watch"), tables={"watch": entries})


@torch.no_grad()
def test_steps_layers_memory_and_tables(seen):
    model = WAN.build()
    with na.apply(model, schedule=watching(["a", "b"])):
        # Two calls a step, as in classifier-free guidance; then another generation.
        for time in (900, 900, 800, 800, 950):
            run(model, at(time))
    first = [call for call in seen if call[1] == 0]
    assert [(step, times) for step, _, times, _ in first] == [
        *((0, 1), (0, 1), (1, 2), (1, 2)),
        (0, 1),
    ]
    assert {(layer, table) for _, layer, _, table in seen} == {(0, "a"), (1, "b")}


def test_tables_of_another_model_and_none(seen):
    model = WAN.build()
    with pytest.raises(ValueError, match="an entry for each of 2 layers: got 3"):
        na.apply(model, schedule=watching([1, 2, 3]))
    with pytest.raises(ValueError, match="watch needs a table"):
        na.apply(model, "watch")
    with pytest.raises(ValueError, match="tables must map methods to lists"):
        na.Schedule(algorithm=na.parse("watch"), tables={"watch": 1})
    schedule = watching([{"order": "hwt"}, [1, 2.5]])
    assert na.Schedule.from_json(schedule.to_json()) == schedule
