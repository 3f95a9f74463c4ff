from itertools import combinations

import pytest

from nabla_attn.moving_shapes.scene import (
    COLOURS,
    DIRECTIONS,
    HELD_OUT,
    KINDS,
    TRAVEL,
    centred,
    held_out_scenes,
    sample_scene,
)


def test_held_out_is_16_of_72_and_spares_every_word():
    triples = {(c, k, d) for c in COLOURS for k in KINDS for d in DIRECTIONS}
    assert len(triples) == 72 and len(HELD_OUT) == 16 and triples >= HELD_OUT
    seen = triples - HELD_OUT
    pairs = ((0, 1), (0, 2), (1, 2))
    for first, second in pairs:
        shown = {(triple[first], triple[second]) for triple in seen}
        assert shown == {(triple[first], triple[second]) for triple in triples}


@pytest.mark.parametrize("num_shapes", [1, 2, 3])
def test_training_scenes_stay_inside_apart_and_off_the_held_out(num_shapes):
    for seed in range(100):
        scene = sample_scene(seed, num_shapes)
        assert len(scene.shapes) == num_shapes
        assert len({shape.colour for shape in scene.shapes}) == num_shapes
        assert not {shape.triple for shape in scene.shapes} & HELD_OUT
        for time in (0, 0.3, 0.45, 0.62, 0.87, 1):
            for shape in scene.shapes:
                x, y = shape.centre(time)
                assert shape.radius <= x <= 1 - shape.radius
                assert shape.radius <= y <= 1 - shape.radius
            for a, b in combinations(scene.shapes, 2):
                (ax, ay), (bx, by) = a.centre(time), b.centre(time)
                assert max(abs(ax - bx), abs(ay - by)) > a.radius + b.radius


def test_a_seed_is_a_scene():
    assert sample_scene(5) == sample_scene(5) != sample_scene(6)


def test_up_is_towards_row_zero():
    scene = next(s for s in held_out_scenes(16) if s.shapes[0].direction == "up")
    shape = scene.shapes[0]
    assert shape.centre(1) == (shape.x, pytest.approx(shape.y - TRAVEL))


def test_a_shape_that_is_alone_crosses_the_middle():
    scenes = {centred(sample_scene(seed)) for seed in range(3000)}
    assert len(scenes) == (72 - 16) * 2 * 2, "a size and a background are all that is left open"
    for scene in scenes:
        (shape,) = scene.shapes
        assert shape.centre(0.5) == (pytest.approx(0.5), pytest.approx(0.5))
        for time in (0, 1):
            assert all(shape.radius < at < 1 - shape.radius for at in shape.centre(time))
    several = sample_scene(0, 2)
    assert centred(several) == several


def test_held_out_scenes_cycle_and_extend():
    scenes = held_out_scenes(32)
    assert {scene.shapes[0].triple for scene in scenes[:16]} == HELD_OUT
    assert scenes[:5] == held_out_scenes(5)
    assert scenes[0] != scenes[16]


@pytest.mark.parametrize("num_shapes", [0, 4])
def test_number_of_shapes_is_checked(num_shapes):
    with pytest.raises(ValueError, match="num_shapes must be 1, 2 or 3: got"):
        sample_scene(0, num_shapes)
