import dataclasses

import pytest

from nabla_attn.config import parse
from nabla_attn.training.recipes import RECIPES, recipe


def test_builtin_is_what_made_the_shipped_model():
    config = recipe("builtin")
    assert [(p.name, p.size, p.frames, p.steps, p.batch, p.thresholds) for p in config.phases] == [
        ("images-32", 32, 13, 300, 32, None),
        ("clips-32", 32, 13, 900, 32, None),
        ("clips-64", 64, 13, 1200, 12, None),
        ("clips-128", 128, 13, 500, 3, None),
        ("long-128", 128, 61, 650, 1, (0.25, 0.7)),
        ("long-128-fine", 128, 61, 850, 1, (0.25, 0.7)),
    ]
    assert config.vae.steps == 2050 and config.seed == 0


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_make_sense(name):
    config = recipe(name)
    names = [phase.name for phase in config.phases]
    assert len(set(names)) == len(names)
    sizes = [phase.size for phase in config.phases]
    assert sizes == sorted(sizes) and config.defaults.height == sizes[-1]
    assert all((phase.frames - 1) % 4 == 0 for phase in config.phases)
    assert config.defaults.frames == config.phases[-1].frames
    tokens = (
        (1 + config.defaults.frames // 4)
        * (config.defaults.height // 8)
        * (config.defaults.width // 8)
    )
    assert tokens >= 4096
    parse(config.defaults.sparse_algo)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


def test_unknown_recipe_names_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown recipe 'bultin'. Known recipes: builtin"):
        recipe("bultin")
