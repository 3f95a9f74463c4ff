import numpy as np
import pytest

from nabla_attn.moving_shapes import Scene, Shape, render, sample_scene
from nabla_attn.moving_shapes.scene import BACKGROUNDS, COLOURS


def still(kind, size="large"):
    return Scene((Shape("red", kind, "right", size, 0.3, 0.5),), "black")


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 32, 32), (5, 50, 83), (13, 96, 64)])
def test_shape_and_type(frames, height, width):
    video = render(sample_scene(0), frames, height, width)
    assert video.shape == (frames, height, width, 3) and video.dtype == np.uint8


@pytest.mark.parametrize(
    ("kind", "area"), [("circle", np.pi * 0.22**2), ("square", 0.44**2), ("triangle", 0.44**2 / 2)]
)
def test_covered_area(kind, area):
    frame = render(still(kind), 1, 200, 200)[0].astype(float)
    red, back = COLOURS["red"][0], BACKGROUNDS["black"][0]
    share = (frame[..., 0] - back) / (red - back)
    assert share.mean() == pytest.approx(area, rel=0.01)


def test_triangle_points_up():
    frame = render(still("triangle"), 1, 100, 100)[0][..., 0] > 100
    rows = frame.sum(1)[frame.any(1)]
    assert rows[0] < rows[-1]


def test_colours_are_exact_inside_and_outside():
    video = render(still("square"), 1, 100, 100)[0]
    assert tuple(video[50, 30]) == COLOURS["red"] and tuple(video[0, 0]) == BACKGROUNDS["black"]


def test_same_scene_at_another_size():
    scene = sample_scene(3, 2)
    large = render(scene, 5, 128, 128).astype(float)
    small = render(scene, 5, 64, 64).astype(float)
    pooled = large.reshape(5, 64, 2, 64, 2, 3).mean((2, 4))
    assert np.abs(pooled - small).mean() < 0.5


def test_window_is_a_crop():
    scene = sample_scene(1)
    whole = render(scene, 5, 128, 96)
    part = render(scene, 5, 64, 48, window=(0.25, 0.5, 0.75, 1.0))
    assert np.abs(part.astype(int) - whole[:, 32:96, 48:]).max() <= 1


def test_one_frame_is_the_first_of_many():
    scene = sample_scene(2)
    assert (render(scene, 1, 40, 40)[0] == render(scene, 9, 40, 40)[0]).all()


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="positive"):
        render(sample_scene(0), 0, 32, 32)
