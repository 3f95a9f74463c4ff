import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from nabla_attn.moving_shapes.ideal import Twin, draw_twin, nearest_ideal
from nabla_attn.moving_shapes.judge import judge, score
from nabla_attn.moving_shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    KINDS,
    Scene,
    describe,
    parse_caption,
    place_shape,
    render,
    write_caption,
)


def scene_of(colour="red", kind="square", direction="right", size="large", background="black"):
    shape = place_shape(random.Random(1), colour, kind, direction, size)
    return Scene((shape,), background)


def damaged(scene, frames=13, side=64, seed=0):
    """A true video, and one whose outline waves in every frame, with a fragment beside it."""
    true = render(scene, frames, side, side)
    noise = np.random.default_rng(seed)
    ragged = np.empty_like(true)
    for index, frame in enumerate(true):
        shifts = [ndimage.gaussian_filter(noise.normal(size=(side, side)), 3) * 20 for _ in "yx"]
        rows, columns = np.mgrid[:side, :side]
        places = [rows + shifts[0], columns + shifts[1]]
        for channel in range(3):
            ragged[index, ..., channel] = ndimage.map_coordinates(
                frame[..., channel], places, order=1, mode="nearest"
            )
    ragged[:, 2:5, 2:5] = COLOURS[scene.shapes[0].colour]
    return true, ragged


def tiny_square():
    video = np.full((13, 64, 64, 3), 16, np.uint8)
    video[:, 20:30, 20:30] = COLOURS["red"]
    return video


def overlap(first, second):
    ground = first[0, 0, -1].astype(float)
    seen = [np.abs(video - ground).max(-1) > 60 for video in (first, second)]
    return (seen[0] & seen[1]).sum() / (seen[0] | seen[1]).sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_a_ragged_shape_becomes_the_true_one(kind, background):
    scene = scene_of(kind=kind, background=background)
    true, ragged = damaged(scene)
    ideal = nearest_ideal(ragged, parse_caption(describe(scene)))
    assert ideal.shape == true.shape and ideal.dtype == np.uint8
    assert max(0.85, overlap(true, ragged)) < overlap(true, ideal)
    right = score(ideal, scene)
    assert all(value for value in right.values() if isinstance(value, bool))
    assert right["outline"] > 0.97 and right["fragments"] == 0


def test_the_shape_is_the_one_that_was_asked_for_not_the_one_that_is_seen():
    square = scene_of(kind="square")
    ideal = nearest_ideal(
        render(square, 13, 64, 64), parse_caption(describe(scene_of(kind="circle")))
    )
    assert judge(ideal).shapes[0].kind == "circle"


def test_without_a_size_and_background_the_seen_ones_are_kept():
    scene = scene_of(size="small", background="white")
    ideal = nearest_ideal(render(scene, 13, 64, 64), parse_caption("a red square moving right"))
    assert overlap(render(scene, 13, 64, 64), ideal) > 0.95


def test_a_single_frame_has_an_ideal_too():
    scene = scene_of()
    assert (
        overlap(
            render(scene, 1, 64, 64),
            nearest_ideal(render(scene, 1, 64, 64), parse_caption(describe(scene))),
        )
        > 0.95
    )


@pytest.mark.parametrize(
    "video",
    [
        np.full((13, 64, 64, 3), 16, np.uint8),
        render(scene_of(background="white"), 13, 64, 64),
        render(scene_of(), 3, 64, 64),
        tiny_square(),
    ],
    ids=["nothing", "other background", "jumps", "too small"],
)
def test_what_shows_no_such_shape_has_no_ideal(video):
    words = parse_caption("a large red square moving right on a black background")
    assert nearest_ideal(video, words) is None


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    direction=st.sampled_from(list(DIRECTIONS)),
    background=st.sampled_from(list(BACKGROUNDS)),
    seed=st.integers(0, 1000),
)
def test_a_twin_shows_what_its_caption_says(kind, direction, background, seed):
    scene = scene_of("green", kind, direction, "small", background)
    video, words = render(scene, 9, 64, 64), parse_caption(describe(scene))
    twin = draw_twin(video, words, random.Random(seed))
    changed = twin.of_video(video, words, video[0, 0, 0].astype(np.float32))
    said = twin.of_words(words)
    assert parse_caption(write_caption(said)) == said
    facts = judge(changed)
    (shape,) = facts.shapes
    wanted = said.shapes[0]
    assert (shape.colour, shape.kind, shape.direction, shape.size) == (
        wanted.colour,
        wanted.kind,
        wanted.direction,
        wanted.size,
    )
    assert facts.background == said.background


def test_a_twin_keeps_what_is_ragged():
    scene = scene_of()
    true, ragged = damaged(scene)
    words = parse_caption(describe(scene))
    twin = Twin(0, 0, True, 1, "cyan", "white")
    ground = true[0, 0, -1].astype(np.float32)
    changed = [twin.of_video(video, words, ground) for video in (true, ragged)]
    assert overlap(*changed) == pytest.approx(overlap(true, ragged), abs=0.02)
