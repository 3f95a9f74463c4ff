import random
import re
from itertools import product
from pathlib import Path

import pytest

from nabla_attn.generation.pipeline import model_directory
from nabla_attn.generation.request import ModelDefaults
from nabla_attn.moving_shapes import (
    HELD_OUT,
    Scene,
    Shape,
    describe,
    parse_caption,
    sample_scene,
)
from nabla_attn.moving_shapes.scene import EXAMPLES, ShapeWords, Words, say

ROOT = Path(__file__).parents[2]


def is_trained(caption):
    shapes = parse_caption(caption).shapes
    return all((each.colour, each.kind, each.direction) not in HELD_OUT for each in shapes)


def test_examples_are_of_combinations_that_training_shows():
    assert len(EXAMPLES) == 3 and all(map(is_trained, EXAMPLES))
    assert ModelDefaults.load(model_directory("builtin")).examples == list(EXAMPLES)


def test_documents_ask_for_combinations_that_training_shows():
    pages = [ROOT / "README.md", ROOT / "Makefile", *(ROOT / "docs").rglob("*.md")]
    pages += (ROOT / "docs").rglob("*.py")
    found = [
        prompt
        for page in pages
        for prompt in re.findall(r"prompt (?:= )?\"([^\"]* moving [^\"]*)\"", page.read_text())
    ]
    assert len(found) > 5 and not [prompt for prompt in found if not is_trained(prompt)]


@pytest.mark.parametrize("num_shapes", [1, 2, 3])
def test_full_captions_read_back(num_shapes):
    for seed in range(40):
        scene = sample_scene(seed, num_shapes)
        words = parse_caption(describe(scene))
        assert words.background == scene.background
        assert words == say(scene)
        assert [(s.colour, s.kind, s.direction, s.size, s.lane) for s in words.shapes] == [
            (s.colour, s.kind, s.direction, s.size, s.lane) for s in scene.shapes
        ]


def test_short_captions_leave_words_out():
    rng = random.Random(0)
    captions = {describe(sample_scene(0), rng, drop=0.5) for _ in range(100)}
    words = [parse_caption(caption) for caption in captions]
    said = {(w.shapes[0].size is None, w.shapes[0].lane is None, w.background is None) for w in words}
    assert said == set(product((True, False), repeat=3)) and len(captions) == len(said)


@pytest.mark.parametrize(
    ("direction", "x", "y", "lane"),
    [
        ("right", 0.25, 0.25, "first row"),
        ("left", 0.75, 0.5, "second row"),
        ("up", 0.75, 0.75, "third column"),
        ("down", 0.25, 0.25, "first column"),
        ("down", 0.3, 0.25, None),
    ],
)
def test_lanes_are_counted_from_the_top_and_from_the_left(direction, x, y, lane):
    shape = Shape("red", "circle", direction, "small", x, y)
    assert shape.lane == lane
    caption = describe(Scene((shape,), "black"))
    where = "" if lane is None else f" in the {lane}"
    assert caption == f"a small red circle moving {direction}{where} on a black background"
    assert parse_caption(caption).shapes[0].lane == lane


def test_a_shape_that_goes_up_is_in_no_row():
    with pytest.raises(ValueError, match="first, second, third row, others in such a column"):
        parse_caption("a red circle moving up in the first row")


def test_loose_spelling():
    expected = Words((ShapeWords("red", "circle", "right"),))
    for text in (
        "a red circle moving right",
        "  A Red  circle moving RIGHT. ",
        "red circle moving right",
    ):
        assert parse_caption(text) == expected


@pytest.mark.parametrize(
    "text", ["", "a pink circle moving right", "a red circle", "hello and bye"]
)
def test_other_sentences_are_refused(text):
    with pytest.raises(ValueError, match="colours: red"):
        parse_caption(text)
