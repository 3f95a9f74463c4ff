import pytest

import nabla_attn as na
from nabla_attn.config import DENSE

NABLA = na.parse("nabla-0.7")


def test_window_only_algorithms_start_with_twelve_dense_steps():
    schedule = na.Schedule.default("sta-3-3-3")
    assert [schedule.config_for(step, 0).is_dense for step in (0, 11, 12)] == [True, True, False]
    assert not na.Schedule.default("nabla-0.7_sta-3-3-3").config_for(0, 0).is_dense
    assert not na.Schedule.default("nabla-0.7").config_for(0, 0).is_dense
    assert na.Schedule.default("dense").config_for(0, 0).is_dense


def test_rules_in_their_order():
    schedule = na.Schedule(
        algorithm=NABLA,
        dense_first_steps=2,
        dense_last_steps=1,
        dense_layers=(0, -1),
        layer_overrides={3: na.parse("nabla-0.9")},
        step_overrides={5: na.parse("nabla-0.5")},
        min_tokens=100,
    )

    def at(step, layer, tokens=100):
        config = schedule.config_for(step, layer, num_steps=10, num_layers=8, num_tokens=tokens)
        return str(config)

    assert at(4, 4, tokens=99) == "dense"
    assert at(1, 4) == "dense" and at(9, 4) == "dense"
    assert at(4, 0) == "dense" and at(4, 7) == "dense"
    assert at(5, 3) == "nabla-0.9"
    assert at(5, 4) == "nabla-0.5"
    assert at(4, 4) == "nabla-0.7"


def test_json_round_trip():
    schedule = na.Schedule(
        algorithm=NABLA,
        dense_first_steps=3,
        dense_layers=(0, -1),
        layer_overrides={2: DENSE},
        step_overrides={7: na.parse("nabla-0.3_sta-1-3-3")},
        min_tokens=4096,
    )
    assert na.Schedule.from_json(schedule.to_json()) == schedule
    assert na.Schedule.from_json('{"algorithm": "nabla-0.7"}') == na.Schedule(algorithm=NABLA)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON"),
        ("[]", 'an "algorithm" string'),
        ('{"algorithm": 3}', 'an "algorithm" string'),
        ('{"algorithm": "nabla-7"}', "threshold"),
        ('{"algorithm": "dense", "warmup": 3}', r"unknown schedule fields \['warmup'\]"),
        ('{"algorithm": "dense", "dense_first_steps": -1}', "dense_first_steps must be"),
        ('{"algorithm": "dense", "min_tokens": true}', "min_tokens must be"),
        ('{"algorithm": "dense", "dense_layers": "0"}', "list of whole numbers"),
        ('{"algorithm": "dense", "layer_overrides": {"x": "dense"}}', "layer_overrides"),
        ('{"algorithm": "dense", "step_overrides": [1]}', "step_overrides must map"),
        ('{"algorithm": "dense", "layer_overrides": {"1": "dense", "01": "dense"}}', "'01' is not"),
        ('{"algorithm": "dense", "step_overrides": {"-1": "dense"}}', "steps count from 0: got -1"),
        ('{"algorithm": ' + "[" * 100_000, "must be JSON"),
    ],
)
def test_hostile_json_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        na.Schedule.from_json(text)


def test_overrides_count_layers_from_the_end_too():
    rules = na.Schedule(algorithm=NABLA, layer_overrides={-1: DENSE, 0: na.parse("nabla-0.9")})
    found = [str(rules.config_for(0, layer, num_layers=3)) for layer in range(3)]
    assert found == ["nabla-0.9", "nabla-0.7", "dense"]


@pytest.mark.parametrize("rule", [{"dense_layers": (30,)}, {"layer_overrides": {-31: DENSE}}])
def test_layers_that_a_model_lacks_are_refused(rule):
    rules = na.Schedule(algorithm=NABLA, **rule)
    rules.check_layers(31)
    with pytest.raises(ValueError, match=r"layer -?3[01], and the model has 30"):
        rules.check_layers(30)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"algorithm": "nabla-0.5"}, "what `parse` makes"),
        ({"layer_overrides": {1: "dense"}}, "what `parse` makes"),
        ({"layer_overrides": {"1": DENSE}}, "whole numbers: got '1'"),
        ({"dense_layers": (0.5,)}, "whole numbers: got 0.5"),
        ({"dense_layers": 3}, "must be a list: got 3"),
    ],
)
def test_values_of_another_type_are_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        na.Schedule(**{"algorithm": NABLA} | rule)


@pytest.mark.parametrize(
    "rule",
    [
        {"dense_last_steps": 1},
        {"dense_layers": (-1,)},
        {"layer_overrides": {-1: DENSE}},
        {"min_tokens": 5},
    ],
    ids=str,
)
def test_a_rule_that_needs_an_unknown_number_says_so(rule):
    schedule = na.Schedule(algorithm=NABLA, **rule)
    with pytest.raises(ValueError, match="needs num_"):
        schedule.config_for(0, 0)


def test_json_as_editors_write_it_and_names_that_are_there_twice():
    marked = '\ufeff{"algorithm": "nabla-0.7"}'
    assert na.Schedule.from_json(marked) == na.Schedule(algorithm=NABLA)
    text = '{"algorithm": "nabla-0.7", "step_overrides": {"1": "dense", "1": "nabla-0.3"}}'
    with pytest.raises(ValueError, match="a schedule must be JSON: '1' is there twice"):
        na.Schedule.from_json(text)
