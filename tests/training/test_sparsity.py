from dataclasses import replace

import pytest
import torch
from tests.tiny_diffusers import tiny_wan_transformer

from nabla_attn.calibrated_for import CalibratedFor
from nabla_attn.config import DENSE, parse
from nabla_attn.head_rules import Rule
from nabla_attn.schedule import Schedule
from nabla_attn.training.sections import SparsityConfig
from nabla_attn.training.sparsity import Sparsity, ramped, read_schedule


def forward(model):
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(1, 4, 3, 22, 26),
            timestep=torch.tensor([300.0]),
            encoder_hidden_states=torch.randn(1, 5, 16),
            return_dict=False,
        )[0]


def algorithm(sparsity):
    return sparsity._handle.schedule.algorithm


def test_the_ramp_ends_at_the_target_and_never_rises():
    sparsity = Sparsity(tiny_wan_transformer(), SparsityConfig(algorithm="nabla-0.6", ramp=4))
    seen = []
    for step in range(6):
        sparsity.set_step(step)
        seen.append(algorithm(sparsity).threshold)
    assert seen == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.6, 0.6])


def test_the_ramp_keeps_windows_and_ramps_layers():
    schedule = Schedule(
        algorithm=parse("topk-0.2_sta-3-3-3"), layer_overrides={1: parse("nabla-0.5")}
    )
    half = ramped(schedule, 0.5)
    assert half.algorithm == parse("topk-0.6_sta-3-3-3")
    assert half.layer_overrides[1] == parse("nabla-0.75")
    assert ramped(schedule, 1.0) is schedule


def test_thresholds_are_drawn_evenly_from_their_range_and_validation_keeps_the_target():
    config = SparsityConfig(
        algorithm="nabla-0.5_sta-1-1-1_block-1-2-2", thresholds=(0.3, 0.8), dense_share=0.1
    )
    sparsity = Sparsity(tiny_wan_transformer(), config)
    drawn = []
    for step in range(100):
        sparsity.set_step(step)
        drawn.append(algorithm(sparsity))
    thresholds = [each.threshold for each in drawn if each != DENSE]
    assert len(thresholds) == 90
    counts, _ = torch.histogram(torch.tensor(thresholds), bins=5, range=(0.3, 0.8))
    assert counts.sum() == 90 and counts.min() >= 15
    assert {(each.window, each.block) for each in drawn if each != DENSE} == {
        ((1, 1, 1), (1, 2, 2))
    }
    sparsity.set_step(41)
    assert algorithm(sparsity) == drawn[41]
    sparsity.set_target()
    assert algorithm(sparsity) == parse(config.algorithm)


def test_dense_steps_are_spread_evenly():
    sparsity = Sparsity(tiny_wan_transformer(), SparsityConfig(dense_share=0.25))
    dense = []
    for step in range(12):
        sparsity.set_step(step)
        dense.append(algorithm(sparsity) == DENSE)
    assert [step for step, is_dense in enumerate(dense) if is_dense] == [3, 7, 11]


def test_rules_about_denoising_steps_do_not_apply(tmp_path):
    path = tmp_path / "schedule.json"
    rules = {"dense_first_steps": 3, "reuse_steps": 4, "reuse_guidance": True}
    schedule = Schedule(algorithm=parse("nabla-0.5"), dense_layers=(-1,), **rules)
    path.write_text(schedule.to_json())
    assert read_schedule(SparsityConfig(schedule=str(path))) == schedule
    model = tiny_wan_transformer()
    sparsity = Sparsity(model, SparsityConfig(schedule=str(path)))
    assert sparsity.schedule == Schedule(algorithm=parse("nabla-0.5"), dense_layers=(-1,))
    sparsity.set_target()
    forward(model)
    first, last = sparsity.densities()
    assert first < 1 and last == 1


def test_a_window_alone_is_sparse_from_the_first_forward():
    model = tiny_wan_transformer()
    sparsity = Sparsity(model, SparsityConfig(algorithm="sta-1-1-1"))
    forward(model)
    assert all(density < 1 for density in sparsity.densities())


def test_dense_for_a_block_is_the_plain_model():
    model, plain = tiny_wan_transformer(), tiny_wan_transformer()
    sparsity = Sparsity(model, SparsityConfig(algorithm="nabla-0.2"))
    torch.manual_seed(1)
    expected = forward(plain)
    torch.manual_seed(1)
    with sparsity.dense():
        assert torch.equal(forward(model), expected)
    torch.manual_seed(1)
    assert not torch.equal(forward(model), expected)


def test_dense_training_leaves_the_model_alone():
    model = tiny_wan_transformer()
    sparsity = Sparsity(model, SparsityConfig(algorithm="dense"))
    sparsity.set_step(0)
    with sparsity.dense():
        forward(model)
    assert sparsity.densities() == [] and sparsity.layers == []


def test_a_bad_schedule_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"sparsity\.schedule .*none\.json: No such file"):
        read_schedule(SparsityConfig(schedule=str(tmp_path / "none.json")))


def test_training_follows_rules_for_heads_and_leaves_those_about_steps(tmp_path):
    heads = Rule(algorithm=parse("topk-0.2"), layers=(0,), heads=(1,), reuse_steps=2)
    steps = Rule(algorithm=parse("dense"), steps=(0, 1))
    asked = Schedule(algorithm=parse("nabla-0.5"), rules=(heads, steps))
    path = tmp_path / "schedule.json"
    path.write_text(asked.to_json())
    model = tiny_wan_transformer()
    sparsity = Sparsity(model, SparsityConfig(schedule=str(path), ramp=2))
    assert sparsity.asked == asked
    assert sparsity.schedule.rules == (replace(heads, reuse_steps=None),)
    halfway = ramped(sparsity.schedule, 0.5)
    assert halfway.algorithm.threshold == 0.75
    assert halfway.rules[0].algorithm.topk == pytest.approx(0.6)
    sparsity.set_target()
    forward(model)
    assert sparsity.densities()[0] < 1
    made_for = CalibratedFor(model="Other", layers=2, heads=2, tokens=(3, 11, 13), steps=2)
    path.write_text(replace(asked, calibrated_for=made_for).to_json())
    with pytest.raises(ValueError, match="model Other, here WanTransformer3DModel"):
        Sparsity(tiny_wan_transformer(), SparsityConfig(schedule=str(path)))
    with pytest.warns(UserWarning, match="model Other"):
        Sparsity(tiny_wan_transformer(), SparsityConfig(schedule=str(path), allow_mismatch=True))
