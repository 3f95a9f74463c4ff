import json

import pytest

from nabla_attn.training.config import StageConfig, TrainConfig, differences, to_plain
from nabla_attn.training.recipes import (
    RECIPES,
    distill,
    find_recipe,
    override,
    pretrain,
    read_override,
    read_yaml,
)
from nabla_attn.training.sections import ObjectiveConfig


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid_and_survive_json(name):
    config = override(find_recipe(name), {})
    assert config.recipe == name
    assert override(TrainConfig(), json.loads(json.dumps(to_plain(config)))) == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps: 1\nsteps: 2", r"'steps' is there twice \(line 2, column 1\)"),
        ("a: &a [*a]", "nested too deeply"),
        (
            "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
            + "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)),
            "more than 100000 values",
        ),
        ("- 1\n" * 100, "expected keys with values"),
    ],
)
def test_files_of_which_something_would_be_dropped_or_grow_are_refused(tmp_path, text, words):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"a\.yaml: .*{words}") as error:
        read_yaml(tmp_path / "a.yaml")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_distilling_starts_with_the_papers_numbers():
    optim = distill().optim
    assert (optim.lr, optim.betas, optim.eps) == (1e-6, (0.9, 0.95), 1e-8)
    assert (optim.weight_decay, optim.max_norm, distill().steps) == (0, 0.01, 1600)


def test_keys_may_be_dotted_nested_or_both():
    config = override(TrainConfig(), {"optim.lr": 0.5, "optim": {"eps": 1e-4}, "steps": 7})
    assert (config.optim.lr, config.optim.eps, config.steps) == (0.5, 1e-4, 7)
    assert config.optim.betas == (0.9, 0.95)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim.lr=1e-5", 1e-5),
        ("optim.lr=1", 1.0),
        ("optim.betas=[0.8, 0.9]", (0.8, 0.9)),
        ("optim.betas=0.8,0.9", (0.8, 0.9)),
        ("objective.shift=null", None),
        ("objective.shift=3", 3.0),
        ("lora.targets=to_q,to_k", ("to_q", "to_k")),
        ("lora.targets=true,7", ("true", "7")),
        ("data.shapes=1,2", (1, 2)),
        ("data.shapes=[1, 2]", (1, 2)),
        ("optim.betas=5e-1,0.9", (0.5, 0.9)),
        ("compile=true", True),
        ("data.folder=2024", "2024"),
    ],
)
def test_values_take_the_type_of_their_key(text, expected):
    config = override(TrainConfig(), read_override(text))
    for name in text.partition("=")[0].split("."):
        config = getattr(config, name)
    assert config == expected and type(config) is type(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim.lrr=1", r"unknown key 'optim\.lrr'\. Did you mean optim\.lr\?"),
        ("batch=2", r"unknown key 'batch'\. Did you mean data\.batch"),
        ("learning_rate.x=2", "unknown key"),
        ("steps=1.5", "steps must be a whole number: got 1.5"),
        ("steps=true", "steps must be a whole number: got True"),
        ("optim.lr=fast", "optim.lr must be a number: got 'fast'"),
        ("optim.lr=0", "optim.lr must be more than 0: got 0"),
        ("optim.betas=0.9,1", "optim.betas must be less than 1: got 1"),
        ("data.shapes=4", "data.shapes must be a list such as"),
        ("data.shapes=[4]", "data.shapes must be 3 or less: got 4"),
        ("sparsity={algorithm: dense, algorithms: x}", "Did you mean sparsity.algorithm"),
        ("optim.lr=.nan", "optim.lr must be a finite number: got nan"),
        ("optim.betas=[0.9]", "optim.betas must have 2 values"),
        ("data.shapes=1,2.5", "data.shapes must be a whole number: got 2.5"),
        ("data.shapes=1,{", "data.shapes must be a whole number: got '{'"),
        ("compile=1", "compile must be true or false: got 1"),
        ("optim=3", "optim has keys of its own: got 3"),
        ("optim.lr", "expected key=value"),
        ("=3", "expected key=value"),
        ("optim.lr=[1", "not a value in YAML"),
        ("optim.lr=" + "[" * 5000, "not a value in YAML: it is nested too deeply"),
        ("steps=1" + "0" * 400, r"not a value in YAML: 10+\.\.\. is beyond 64 bits"),
        ("name=2024-13-45", "not a value in YAML: month must be in 1"),
        ("optim={lr: 1, lr: 2}", "not a value in YAML: 'lr' is there twice"),
        ("steps=0", "steps must be 1 or more: got 0"),
        ("data.drop=1.5", "data.drop must be from 0 to 1: got 1.5"),
        ("precision=fp8", "precision must be one of float32, bfloat16: got 'fp8'"),
        ("sparsity.algorithm=nabla-2", r"nabla threshold must be in \(0, 1\]"),
        ("objective.data_weight=1", "are terms of distillation: got objective.kind=flow"),
        ("objective.guidance=0.5", "objective.guidance must be 1 or more: got 0.5"),
        ("stages=[{name: a, folder: b}]", r"stages\.0 lacks steps"),
        (
            "stages=[{name: a, folder: b, step: 1}]",
            r"unknown key 'stages\.0\.step'\. Did you mean stages\.0\.steps\?.*stages\.0\.folder",
        ),
        ("stages=[{name: a, steps: 0}]", "steps must be 1 or more: got 0"),
        ("stages=[{name: a, steps: 1, algorithm: x}]", "'x' is not an algorithm"),
        ("stages=[{name: .., folder: b, steps: 1}]", "names of their own"),
        ("sparsity.thresholds=0.5", "must be a list such as"),
        ("sparsity.thresholds=0.8,0.3", "must be lowest, highest"),
        ("sparsity.thresholds=[0, 0.3]", "more than 0 and at most 1: got 0.0, 0.3"),
        ("sparsity.thresholds=[.nan, 0.3]", "sparsity.thresholds must be a finite number: got nan"),
    ],
)
def test_bad_overrides_are_one_clear_line(text, message):
    with pytest.raises(ValueError, match=message) as error:
        override(TrainConfig(), read_override(text))
    assert "\n" not in str(error.value)


def test_a_configuration_in_code_is_checked_too():
    with pytest.raises(ValueError, match="should be greater than or equal to 1"):
        TrainConfig(steps=0)
    with pytest.raises(ValueError, match=r"Use objective\.kind=distill"):
        ObjectiveConfig(guidance=5)
    with pytest.raises(ValueError, match="sharding=fsdp with context_parallel"):
        TrainConfig(sharding="fsdp", context_parallel=2)


def test_combinations_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="a dense student has nothing to learn"):
        override(distill(), {"sparsity.algorithm": "dense"})
    with pytest.raises(ValueError, match=r"sparsity\.ramp lowers a threshold"):
        override(pretrain(), {"sparsity.algorithm": "sta-3-3-3", "sparsity.ramp": 10})
    for values in ({"algorithm": "topk-0.3"}, {"schedule": "layers.json"}):
        with pytest.raises(ValueError, match="need one NABLA algorithm for all layers"):
            override(distill(), {"sparsity": values | {"thresholds": [0.3, 0.8]}})
    with pytest.raises(ValueError, match="Turn these off"):
        override(distill(), {"objective.layer_weight": 1, "compile": True})
    with pytest.raises(ValueError, match=r"Use objective\.kind=distill"):
        override(pretrain(), {"objective.guidance": 5})
    with pytest.raises(ValueError, match="which guidance does not change"):
        override(distill(), {"objective.guidance": 5, "objective.layer_weight": 1})
    stages = [{"name": name, "steps": 1} for name in "ab"]
    with pytest.raises(ValueError, match="guide predictions that include guidance"):
        override(distill(), {"objective.guidance": 5, "stages": stages})


def test_a_dense_student_of_guidance_learns_something():
    config = override(distill(), {"objective.guidance": 5, "sparsity.algorithm": "dense"})
    assert config.objective.guidance == 5


def test_stages_are_read_from_yaml(tmp_path):
    path = tmp_path / "stages.yaml"
    path.write_text("stages:\n- {name: small, folder: a, steps: 5, batch: 2}\n")
    (stage,) = override(TrainConfig(), read_yaml(path)).stages
    assert stage == StageConfig("small", 5, "a", 2)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [\n", "\xff"])
def test_files_that_are_no_mapping_are_refused(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"bad\.yaml"):
        read_yaml(path)
    with pytest.raises(ValueError, match="No such file"):
        read_yaml(tmp_path / "none.yaml")


def test_differences_are_named():
    old = to_plain(TrainConfig())
    new = to_plain(override(TrainConfig(), {"optim.lr": 1e-3}))
    assert differences(old, old) == []
    assert differences(old, new) == ["optim.lr: 1e-06 -> 0.001"]


def test_a_key_of_a_newer_version_is_no_difference_at_its_default():
    old = to_plain(TrainConfig())
    del old["objective"]["guidance"]
    assert differences(old, to_plain(TrainConfig())) == []
    guided = to_plain(override(distill(), {"objective.guidance": 5}))
    old = to_plain(distill())
    del old["objective"]["guidance"]
    assert differences(old, guided) == ["objective.guidance: 1.0 -> 5.0"]
