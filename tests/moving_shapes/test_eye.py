"""The judge lets pass what a person accepts, and nothing that a person refuses."""

import numpy as np
import pytest
from benchmarks.judge_eye import accepted, draw, passes, refused, turned

from nabla_attn.moving_shapes import Scene, Shape, judge, render, score
from nabla_attn.moving_shapes.outline import REACH, fit_shape
from nabla_attn.moving_shapes.scene import KINDS, SIZES, signed_distance


@pytest.mark.parametrize("picture", list(accepted()), ids=lambda picture: picture.name)
def test_what_a_person_accepts_passes(picture):
    right = score(picture.video, picture.scene)
    assert passes(right), right
    assert right["outline"] > 0.95 and right["outline_min"] > 0.93


@pytest.mark.parametrize("picture", list(refused()), ids=lambda picture: picture.name)
def test_what_a_person_refuses_does_not(picture):
    right = score(picture.video, picture.scene)
    assert not passes(right), right
    assert right["colour"] and right["direction"] and right["background"], right


@pytest.mark.parametrize("kind", KINDS)
def test_a_shape_ends_where_its_outline_does(kind):
    dy, dx = np.mgrid[-2:2:41j, -2:2:41j]
    inside = REACH[kind](dx, dy) < 1
    assert (inside == (signed_distance(kind, dx, dy, 1.0) < 0)).all() and inside.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_the_fit_finds_place_and_size(kind, size):
    scene = Scene((Shape("red", kind, "right", size, 0.317, 0.523),), "black")
    spot = render(scene, 1, 128, 128)[0, ..., 0] > 118
    fits = {other: fit_shape(spot, other) for other in KINDS}
    assert fits[kind].overlap > 0.98
    assert abs(fits[kind].radius / 128 - SIZES[size]) < 0.005
    assert max(fits[other].overlap for other in KINDS if other != kind) < 0.9


def test_a_shape_that_leaves_the_frame_fits_with_what_is_seen():
    spot = np.hypot(*np.mgrid[-5:59, -20:44]) < 18
    assert fit_shape(spot, "circle").overlap > 0.95


def test_the_worst_frame_and_the_mean_are_told():
    scene = Scene((Shape("red", "square", "right", "large", 0.3, 0.5),), "black")
    video = draw(scene, frames=5)
    video[2] = draw(scene, turned(REACH["square"], 0.7), frames=5)[2]
    facts = judge(video).shapes[0]
    assert facts.kind is None and facts.outline > 0.93 and facts.outline_min < 0.85
    right = score(video, scene)
    assert right["outline"] == round(facts.outline, 4) and right["shape"] is False
    nothing = score(np.full_like(video, 16), scene)
    assert nothing["outline"] == nothing["outline_min"] == 0
