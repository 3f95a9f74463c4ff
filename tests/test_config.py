import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nabla_attn as na


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("nabla-0.7", {"threshold": 0.7}),
        ("nabla-1", {"threshold": 1.0}),
        ("sta-11-3-3", {"window": (11, 3, 3)}),
        ("nabla-0.6_sta-11-3-3", {"threshold": 0.6, "window": (11, 3, 3)}),
        ("sta-11-3-3_nabla-0.6", {"threshold": 0.6, "window": (11, 3, 3)}),
        ("topk-0.2", {"topk": 0.2}),
        ("topk-0.2_sta-1-3-5", {"topk": 0.2, "window": (1, 3, 5)}),
        ("nabla-0.7_block-4-4-4", {"threshold": 0.7, "block": (4, 4, 4)}),
        ("block-1-16-16_sta-3-1-1", {"window": (3, 1, 1), "block": (1, 16, 16)}),
        ("dense", {}),
        ("  nabla-.5 ", {"threshold": 0.5}),
    ],
)
def test_grammar(text, fields):
    config = na.parse(text)
    assert config == na.SparseConfig(**fields)
    assert config.is_dense == (not fields)


@given(
    threshold=st.none() | st.floats(1e-9, 1),
    window=st.none() | st.tuples(*[st.integers(1, 99)] * 3),
    block=st.none() | st.tuples(*[st.integers(1, 99)] * 3),
    is_topk=st.booleans(),
)
def test_strings_round_trip(threshold, window, block, is_topk):
    rules = {"topk" if is_topk else "threshold": threshold, "window": window}
    block = block if any(rules.values()) else None
    config = na.SparseConfig(**rules, block=block)
    assert na.parse(str(config)) == config


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("nabla-1.7", "threshold must be in"),
        ("nabla-0", "threshold must be in"),
        ("sta-11-3", "'sta-11-3' is not"),
        ("sta-11-3-x", "'sta-11-3-x' is not"),
        ("sta-0-3-3", "positive integers"),
        ("nabla0.6", "'nabla0.6' is not"),
        ("nabla-nan", "'nabla-nan' is not"),
        ("nabla--0.5", "'nabla--0.5' is not"),
        ("nabla-1e-1", "is not an algorithm"),
        ("", "must not be empty"),
        ("   ", "must not be empty"),
        ("radial", "'radial' is not"),
        ("nabla-0.6_foo-1", "'foo-1' in 'nabla-0.6_foo-1'"),
        ("nabla-0.6_nabla-0.7", "repeats"),
        ("topk-0.2_sta-3-3-3_topk-0.3", "repeats"),
        ("topk-share=0.2-0.3", "'topk-share=0.2-0.3' is not"),
        ("topk-part=0.2", r"topk has the parameters \['share'\]: got 'part'"),
        ("dense_sta-3-3-3", "'dense' in"),
        ("block-4-4-4", "a block needs a method that chooses blocks"),
        ("nabla-0.6_block-4-4", "'block-4-4' in .* Expected block-FRAMES-HEIGHT-WIDTH"),
        ("nabla-0.6_block-0-4-4", r"block sides must be three positive integers .* \(0, 4, 4\)"),
        ("nabla-0.6_", "'' in 'nabla-0.6_'"),
    ],
)
def test_errors_name_the_part_at_fault(text, part):
    with pytest.raises(ValueError, match=part):
        na.parse(text)


@pytest.mark.parametrize(
    "fields",
    [
        {"threshold": float("nan")},
        {"threshold": "0.5"},
        {"topk": 0},
        {"window": (1, 2)},
        {"window": 3},
        {"threshold": 0.5, "block": (4, 4)},
        {"threshold": True},
    ],
)
def test_configs_check_themselves(fields):
    with pytest.raises(ValueError, match="must be"):
        na.SparseConfig(**fields)


def test_numbers_of_numpy_are_numbers():
    config = na.SparseConfig(threshold=np.float32(0.75), window=(1, 3, 3))
    assert config == na.parse("nabla-0.75_sta-1-3-3") and type(config.threshold) is float
    assert na.TokenGrid(np.int64(2), 8, 8) == na.TokenGrid(2, 8, 8)


def test_a_block_is_a_block_shape():
    with pytest.raises(ValueError, match=r"must be a BlockShape: got \(1, 8, 8\)"):
        na.TokenGrid(2, 8, 8, block=(1, 8, 8))


def test_configs_are_frozen_and_hashable():
    config = na.parse("nabla-0.7")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.threshold = 0.5
    assert len({config, na.parse("nabla-0.70")}) == 1


@pytest.mark.parametrize(
    "text", ["nabla-0.7_keep-first-frame", "topk-0.2_pair-pool", "topk-0.2_tail-first"]
)
def test_every_rule_of_a_map_has_a_spelling(text):
    assert str(na.parse(text)) == text
    assert na.Schedule.from_json(na.Schedule(algorithm=na.parse(text)).to_json()).algorithm == (
        na.parse(text)
    )


@pytest.mark.parametrize("text", ["dense_pair-union", "keep-first-frame", "nabla-0.5_keep-last"])
def test_rules_that_stand_alone_or_are_unknown_are_named(text):
    with pytest.raises(ValueError, match=r"needs a method|is not an algorithm"):
        na.parse(text)


def test_a_bare_number_is_answered_with_its_algorithm():
    with pytest.raises(ValueError, match=r'such as "nabla-0\.65": got 0\.65'):
        na.parse(0.65)
