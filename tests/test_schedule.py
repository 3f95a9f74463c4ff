import json
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nabla_attn as na
from nabla_attn.calibrated_for import CalibratedFor
from nabla_attn.config import DENSE
from nabla_attn.head_rules import Rule, read_numbers, write_numbers

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


RULES = (
    Rule(algorithm=na.parse("topk-0.1_tail-first"), layers=(0, -1), heads=(0, 2), steps=(0, 1)),
    Rule(algorithm=DENSE, layers=(1,), heads=(1,)),
    Rule(algorithm=na.parse("nabla-0.3"), steps=(5,), reuse_steps=3),
)
MADE_FOR = CalibratedFor(model="Wan", layers=3, heads=4, tokens=(2, 8, 8), steps=6, version="0.1.0")


def test_rules_for_heads_and_steps_in_their_order():
    schedule = na.Schedule(algorithm=NABLA, rules=RULES, layer_overrides={2: DENSE})

    def at(step, layer):
        groups = schedule.groups_for(step, layer, 4, num_layers=3)
        for group in groups:
            for head in group.heads:
                assert schedule.config_for(step, layer, head=head, num_layers=3) == group.config
        return {str(group.config): group.heads for group in groups}

    first = {"topk-0.1_tail-first": (0, 2)}
    assert at(0, 0) == first | {"nabla-0.7": (1, 3)}
    assert at(1, 2) == first | {"dense": (1, 3)}
    assert at(2, 0) == {"nabla-0.7": (0, 1, 2, 3)} and at(2, 2) == {"dense": (0, 1, 2, 3)}
    assert at(5, 1) == {"nabla-0.3": (0, 2, 3), "dense": (1,)}
    assert schedule.groups_for(5, 0, 4, num_layers=3)[0].reuse_steps == 3
    assert schedule.groups_for(2, 0, 4, num_layers=3)[0].reuse_steps == 1
    assert schedule.reuses_maps and schedule.periods == (1, 3)
    with pytest.raises(ValueError, match="a rule for some heads needs head"):
        schedule.config_for(0, 0, num_layers=3)
    late = replace(schedule, dense_first_steps=1)
    assert late.groups_for(0, 0, 4, num_layers=3) == [((0, 1, 2, 3), DENSE, 1)]


def test_rules_for_heads_read_back_a_rule_a_line():
    schedule = na.Schedule(algorithm=NABLA, rules=RULES, calibrated_for=MADE_FOR)
    text = schedule.to_json()
    assert na.Schedule.from_json(text) == schedule
    line = (
        '{"layers": "-1, 0", "heads": "0, 2", "steps": "0, 1", "algorithm": "topk-0.1_tail-first"}'
    )
    assert f"    {line},\n" in text
    assert "layers -1, 0 heads 0, 2 steps 0, 1: topk-0.1_tail-first" in str(schedule)
    assert "step 5: nabla-0.3, one map for 3 steps" in str(schedule)
    # Records of older versions hold schedules without the new fields.
    assert "rules" not in na.Schedule(algorithm=NABLA).to_json()
    as_lists = '{"algorithm": "nabla-0.7", "rules": [{"heads": [1], "algorithm": "dense"}]}'
    assert na.Schedule.from_json(as_lists).rules == (Rule(algorithm=DENSE, heads=(1,)),)


def test_rules_without_steps_stay_where_steps_are_not_known():
    schedule = na.Schedule(algorithm=NABLA, rules=RULES, step_overrides={1: DENSE})
    assert schedule.without_steps() == na.Schedule(algorithm=NABLA, rules=RULES[1:2])


@given(st.sets(st.integers(-5, 60), min_size=1))
def test_numbers_read_back(numbers):
    assert set(read_numbers(write_numbers(numbers))) == numbers
    assert write_numbers({0, 1, 2, 5, 7, 8}) == "0-2, 5, 7, 8"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"heads": "0"}, 'an "algorithm" string'),
        ({"algorithm": "dense", "head": "0"}, r"unknown fields of a rule \['head'\]"),
        ({"algorithm": "dense", "heads": "0-"}, "numbers are written as"),
        ({"algorithm": "dense", "heads": 3}, "numbers are written as"),
        ({"algorithm": "dense", "heads": []}, "one or more"),
        ({"algorithm": "dense", "heads": [True]}, "whole numbers"),
        ({"algorithm": "dense", "heads": "1, 1"}, "a number twice"),
        ({"algorithm": "dense", "heads": "-1"}, "heads count from 0: got -1"),
        ({"algorithm": "dense", "steps": "5-3"}, "a range goes up"),
        ({"algorithm": "dense", "steps": "0-999999999"}, "by less than"),
        ({"algorithm": "dense", "reuse_steps": 0}, "1 or more: got 0"),
    ],
)
def test_rules_of_another_form_are_named(rule, message):
    with pytest.raises(ValueError, match=message):
        na.Schedule.from_json(json.dumps({"algorithm": "dense", "rules": [rule]}))


@pytest.mark.parametrize(
    ("field", "value", "here"),
    [
        ("model", "Hunyuan", "model Wan, here Hunyuan"),
        ("heads", 12, "heads 4, here 12"),
        ("tokens", (2, 8, 9), "tokens 2x8x8, here 2x8x9"),
        ("steps", 50, "steps 6, here 50"),
        ("version", "0.2.0", "version 0.1.0, here 0.2.0"),
    ],
)
def test_what_a_schedule_was_not_calibrated_for_is_refused_or_warned_of(field, value, here):
    schedule = na.Schedule(algorithm=NABLA, calibrated_for=MADE_FOR)
    same = asdict(MADE_FOR)
    schedule.check_match(**same)
    with pytest.raises(ValueError, match=f"calibrated for {here}.*allow-mismatch"):
        schedule.check_match(**same | {field: value})
    with pytest.warns(UserWarning, match=here):
        replace(schedule, allow_mismatch=True).check_match(**same | {field: value})
    schedule.check_match(**{field: None})
    schedule.check_match(version="0.1.7")


@pytest.mark.parametrize(
    "values", [3, {}, asdict(MADE_FOR) | {"heads": 0}, asdict(MADE_FOR) | {"model": 3}]
)
def test_an_identity_of_another_form_is_named(values):
    with pytest.raises(ValueError, match="calibrated_for"):
        na.Schedule.from_json(json.dumps({"algorithm": "dense", "calibrated_for": values}))


def test_overrides_count_layers_from_the_end_too():
    rules = na.Schedule(algorithm=NABLA, layer_overrides={-1: DENSE, 0: na.parse("nabla-0.9")})
    found = [str(rules.config_for(0, layer, num_layers=3)) for layer in range(3)]
    assert found == ["nabla-0.9", "nabla-0.7", "dense"]


@pytest.mark.parametrize("rule", [{"dense_layers": (30,)}, {"layer_overrides": {-31: DENSE}}])
def test_layers_that_a_model_lacks_are_refused(rule):
    rules = na.Schedule(algorithm=NABLA, **rule)
    rules.check_layers(31)
    heads = na.Schedule(algorithm=NABLA, rules=(Rule(algorithm=DENSE, heads=(0, 4)),))
    heads.check_layers(1, num_heads=5)
    with pytest.raises(ValueError, match="head 4, and the model has 4"):
        heads.check_layers(1, num_heads=4)
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
