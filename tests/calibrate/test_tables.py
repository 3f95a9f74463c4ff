"""Tables of calibrated methods: made from dense runs, kept in a schedule, refused elsewhere."""

import json

import pytest
import torch
from typer.testing import CliRunner

import nabla_attn as na
from nabla_attn import methods
from nabla_attn.cli import app
from nabla_attn.methods import parameters

SIZE = ["--height=144", "--width=176", "--frames=5", "--steps=2", "--dtype=float32"]


class Counter:
    """Counts the calls of a layer, with its steps and tokens."""

    def __init__(self, params, grid):
        self.params, self.grid, self.steps = params, grid, []

    def observe(self, q, k, v, state):
        assert q.shape == v.shape and q.shape[2] == self.grid.num_slots
        assert state.counts.sum() == self.grid.num_tokens and state.num_steps == 2
        self.steps.append(state.step)

    def entry(self):
        return {"steps": self.steps, "reach": self.params.reach}


@pytest.fixture
def learnt(monkeypatch):
    """Registers a method with a table; returns what it was given."""
    monkeypatch.setattr(methods, "_OWN", {})
    seen = []

    @na.register_method(
        "learnt", parameters=[parameters.count("reach")], needs=("table",), calibrate=Counter
    )
    def select(q, k, grid, params, state):
        seen.append(state.table)
        return torch.ones(1, 1, grid.num_blocks, grid.num_blocks, dtype=torch.bool)

    return seen


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_one_command_makes_the_table_and_one_uses_it(learnt, tiny_wan, tmp_path):
    options = ["--model", tiny_wan, *SIZE]
    made = run(
        *("calibrate", "--method=learnt-3", "--num-prompts=1", *options),
        *("--output", tmp_path, "--json"),
    )
    assert made.exit_code == 0, made.output
    schedule = na.Schedule.from_json((tmp_path / "schedule.json").read_text())
    assert json.loads(made.stdout)["algorithm"] == str(schedule.algorithm) == "learnt-3"
    entry = schedule.tables["learnt"][0]
    assert set(entry["steps"]) == {0, 1} and entry["reach"] == 3
    assert schedule.calibrated_for.steps == 2
    target = tmp_path / "a.mp4"
    used = run(
        *("generate", "--prompt=red", "--schedule", tmp_path / "schedule.json", *options),
        *("--output", target),
    )
    assert used.exit_code == 0 and target.exists(), used.output
    assert learnt and all(table["reach"] == 3 for table in learnt)


def test_what_cannot_be(learnt, tiny_wan, tmp_path):
    options = ["--model", tiny_wan, *SIZE, "--output", tmp_path]
    for arguments, message in (
        (["--method=nabla-0.5"], "one method that needs one: got nabla-0.5"),
        (["--method=learnt-3", "--density=0.2"], "takes no budget: drop --density"),
    ):
        result = run("calibrate", *arguments, *options)
        assert result.exit_code != 0 and message in " ".join(result.output.split())
    target = ["--output", tmp_path / "b.mp4"]
    result = run("generate", "--prompt=red", "--sparse-algo=learnt-3", *options[:-2], *target)
    assert "nabla calibrate --method learnt" in " ".join(result.output.split())
