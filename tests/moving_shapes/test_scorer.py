import pytest

from nabla_attn.moving_shapes import describe, held_out_scenes, render
from nabla_attn.moving_shapes.judge import MovingShapesScorer
from nabla_attn.moving_shapes.scene import lanes

WORLD = MovingShapesScorer()


def test_prompts_are_scored_by_what_they_name():
    scene = held_out_scenes(1)[0]
    video, prompt = render(scene, 17, 96, 96), describe(scene)
    assert WORLD.score(video, prompt)["all"] is True
    other = prompt.replace(scene.shapes[0].colour, "cyan" if "cyan" not in prompt else "red")
    right = WORLD.score(video, other)
    assert not right["colour"]
    assert not right["all"]
    assert right["direction"]
    short = f"a {scene.shapes[0].colour} {scene.shapes[0].kind} moving {scene.shapes[0].direction}"
    facts = {name for name, value in WORLD.score(video, short).items() if value is True}
    assert facts == {"number", "colour", "shape", "direction", "all"}
    assert WORLD.score(video, "two cats in a field") is None


def test_a_shape_in_another_lane_than_asked_for_is_wrong():
    for scene in held_out_scenes(24):
        video, prompt, lane = render(scene, 17, 96, 96), describe(scene), scene.shapes[0].lane
        for asked in lanes(scene.shapes[0].direction):
            right = WORLD.score(video, prompt.replace(lane, asked))
            assert right["lane"] == right["all"] == (asked == lane), prompt


def test_prompts_are_different_and_limited():
    assert len(set(WORLD.prompts(20))) == 20
    assert WORLD.prompts(5) == WORLD.prompts(20)[:5]
    assert len(set(WORLD.prompts(192))) == 192
    with pytest.raises(ValueError, match="has 192 held-out prompts: got 193"):
        WORLD.prompts(193)
