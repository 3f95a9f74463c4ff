import random

import pytest

from nabla_attn.moving_shapes import describe, parse_caption, sample_scene
from nabla_attn.moving_shapes.scene import ShapeWords, Words


@pytest.mark.parametrize("num_shapes", [1, 2, 3])
def test_full_captions_read_back(num_shapes):
    for seed in range(40):
        scene = sample_scene(seed, num_shapes)
        words = parse_caption(describe(scene))
        assert words.background == scene.background
        assert [(s.colour, s.kind, s.direction, s.size) for s in words.shapes] == [
            (s.colour, s.kind, s.direction, s.size) for s in scene.shapes
        ]


def test_short_captions_leave_words_out():
    rng = random.Random(0)
    captions = {describe(sample_scene(0), rng, drop=0.5) for _ in range(50)}
    assert len(captions) == 4
    words = [parse_caption(caption) for caption in captions]
    assert {(w.shapes[0].size is None, w.background is None) for w in words} == {
        (a, b) for a in (True, False) for b in (True, False)
    }


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
