import random
import re
from pathlib import Path

import pytest

from nabla_attn.generation.pipeline import model_directory
from nabla_attn.generation.request import ModelDefaults
from nabla_attn.moving_shapes import HELD_OUT, describe, parse_caption, sample_scene
from nabla_attn.moving_shapes.scene import EXAMPLES, ShapeWords, Words

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
        assert [(s.colour, s.kind, s.direction, s.size) for s in words.shapes] == [
            (s.colour, s.kind, s.direction, s.size) for s in scene.shapes
        ]


def short_captions(size, background):
    """What captions of one scene leave out: (size, background) of each kind of caption."""
    scene = next(s for s in map(sample_scene, range(99)) if is_seen(s, size, background))
    rng = random.Random(0)
    words = [parse_caption(describe(scene, rng, drop=0.5)) for _ in range(50)]
    return {(w.shapes[0].size is None, w.background is None) for w in words}


def is_seen(scene, size, background):
    return (scene.shapes[0].size, scene.background) == (size, background)


def test_short_captions_leave_out_what_is_usual():
    every = {(a, b) for a in (True, False) for b in (True, False)}
    assert short_captions("large", "black") == every
    assert short_captions("small", "black") == {(False, True), (False, False)}
    assert short_captions("large", "white") == {(True, False), (False, False)}
    assert short_captions("small", "white") == {(False, False)}


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
