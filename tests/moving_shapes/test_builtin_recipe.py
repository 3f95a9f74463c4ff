import dataclasses
import json
from pathlib import Path

import pytest

from nabla_attn.config import parse
from nabla_attn.moving_shapes.recipe import builtin
from nabla_attn.record import RunRecord

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_builtin_is_what_made_the_shipped_model():
    record = RunRecord.load(RESULTS / "builtin_training.json")
    # How it is sampled was chosen after training.
    same = {"defaults": record.config["defaults"]}
    assert record.config == json.loads(json.dumps(dataclasses.asdict(builtin()) | same))
    stages = [(stage["stage"], stage["steps"]) for stage in record.numbers["stages"]]
    config = builtin()
    assert stages == [("vae", config.vae.steps), *((p.name, p.steps) for p in config.phases)]


def test_the_recipe_makes_sense():
    config = builtin()
    names = [phase.name for phase in config.phases]
    assert len(set(names)) == len(names)
    assert config.defaults.height == config.phases[-1].size
    assert all((phase.frames - 1) % 4 == 0 for phase in config.phases)
    assert config.defaults.frames == config.phases[-1].frames
    tokens = (
        (1 + config.defaults.frames // 4)
        * (config.defaults.height // 8)
        * (config.defaults.width // 8)
    )
    assert tokens >= 9000
    parse(config.defaults.sparse_algo)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
