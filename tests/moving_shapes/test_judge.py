import numpy as np
import pytest

from nabla_attn.moving_shapes import (
    Scene,
    Shape,
    held_out_scenes,
    judge,
    render,
    sample_scene,
    score,
)
from nabla_attn.moving_shapes.scene import BACKGROUNDS, COLOURS, DIRECTIONS, KINDS, SIZES

SCENE = Scene((Shape("red", "circle", "right", "small", 0.3, 0.5),), "black")


def wrong(video, scene):
    return {name for name, right in score(video, scene).items() if right is False}


@pytest.mark.parametrize(
    ("frames", "height", "width", "seeds"),
    [
        (13, 64, 64, range(6)),
        (5, 128, 128, range(6, 12)),
        (17, 96, 64, range(6)),
        (9, 72, 120, range(6, 12)),
    ],
)
@pytest.mark.parametrize("num_shapes", [1, 2, 3])
def test_rendered_truth_is_all_right(frames, height, width, seeds, num_shapes):
    for seed in seeds:
        scene = sample_scene(seed, num_shapes)
        assert not wrong(render(scene, frames, height, width), scene), seed


def test_every_held_out_scene_at_full_size():
    for scene in held_out_scenes(16):
        assert not wrong(render(scene, 5, 256, 256), scene)


def test_every_single_shape():
    for colour in COLOURS:
        for kind in KINDS:
            for size in SIZES:
                for background in BACKGROUNDS:
                    shape = Shape(colour, kind, "down", size, 0.5, 0.3)
                    scene = Scene((shape,), background)
                    assert not wrong(render(scene, 3, 64, 64), scene), scene


@pytest.mark.parametrize("sigma", [5, 15])
def test_noise_and_blur_are_forgiven(sigma):
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(0)
    for scene in held_out_scenes(8):
        video = gaussian_filter(render(scene, 9, 96, 96).astype(float), (0, 1, 1, 0))
        noisy = np.clip(video + rng.normal(0, sigma, video.shape), 0, 255).astype(np.uint8)
        assert not wrong(noisy, scene)


def test_blank_video():
    video = np.full((5, 64, 64, 3), 16, np.uint8)
    assert judge(video).num_shapes == 0
    assert wrong(video, SCENE) == {"number", "colour", "shape", "direction", "size"}


def test_pure_noise_is_never_right():
    video = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), np.uint8)
    assert {"number", "colour", "direction"} <= wrong(video, SCENE)


def test_frozen_video_has_no_direction():
    video = np.repeat(render(SCENE, 13, 64, 64)[:1], 13, 0)
    assert wrong(video, SCENE) == {"direction"}


def test_one_frame_has_no_direction():
    assert wrong(render(SCENE, 1, 64, 64), SCENE) == {"direction"}


def test_reversed_video():
    video = render(SCENE, 13, 64, 64)[::-1]
    assert wrong(video, SCENE) == {"direction"}
    assert judge(video).shapes[0].direction == "left"


def test_swapped_colour():
    video = render(SCENE, 13, 64, 64)[..., ::-1].copy()
    assert wrong(video, SCENE) == {"colour"}
    assert judge(video).shapes[0].colour == "blue"


@pytest.mark.parametrize(
    ("change", "attribute"),
    [
        ({"kind": "square"}, "shape"),
        ({"kind": "triangle"}, "shape"),
        ({"size": "large"}, "size"),
        ({"direction": "down"}, "direction"),
        ({"colour": "cyan"}, "colour"),
    ],
)
def test_one_wrong_attribute(change, attribute):
    values = vars(SCENE.shapes[0]) | change
    video = render(Scene((Shape(**values),), "black"), 9, 64, 64)
    assert wrong(video, SCENE) == {attribute}


def test_wrong_background():
    video = render(Scene(SCENE.shapes, "white"), 9, 64, 64)
    assert wrong(video, SCENE) == {"background"}


def test_grey_background_is_unknown():
    video = np.full((3, 64, 64, 3), 128, np.uint8)
    assert judge(video).background is None


def test_missing_and_surplus_shapes():
    two = sample_scene(4, 2)
    one = Scene(two.shapes[:1], two.background)
    assert "number" in wrong(render(one, 9, 64, 64), two)
    assert wrong(render(two, 9, 64, 64), one) == {"number"}


def test_a_shape_that_vanishes_early_is_not_there():
    video = render(SCENE, 12, 64, 64)
    video[4:] = 16
    assert judge(video).num_shapes == 0


def test_two_shapes_of_one_colour_count_as_two():
    shapes = (
        Shape("red", "circle", "right", "small", 0.2, 0.25),
        Shape("red", "square", "right", "small", 0.3, 0.75),
    )
    assert judge(render(Scene(shapes, "white"), 5, 64, 64)).num_shapes == 2


def test_direction_names_cover_the_plane():
    for direction in DIRECTIONS:
        scene = Scene((Shape("green", "square", direction, "small", 0.5, 0.5),), "black")
        assert judge(render(scene, 5, 64, 64)).shapes[0].direction == direction


@pytest.mark.parametrize(
    "video",
    [np.zeros((4, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8), np.zeros((1, 8, 8, 4), np.uint8)],
)
def test_other_arrays_are_refused(video):
    with pytest.raises(ValueError, match="uint8"):
        judge(video)
