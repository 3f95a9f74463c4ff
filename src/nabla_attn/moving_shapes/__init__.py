"""The built-in "moving shapes" world: scenes, their videos and captions, and a judge of videos.

Everything is made by code from a seed, so a model can be trained and judged where nothing can be
downloaded. Sizes and speeds are relative to the frame: the same scene renders at any resolution.
"""

from nabla_attn.moving_shapes.judge import Facts, ShapeFacts, judge, score
from nabla_attn.moving_shapes.scene import (
    HELD_OUT,
    Scene,
    Shape,
    describe,
    held_out_scenes,
    parse_caption,
    render,
    sample_scene,
)

__all__ = [
    "HELD_OUT",
    "Facts",
    "Scene",
    "Shape",
    "ShapeFacts",
    "describe",
    "held_out_scenes",
    "judge",
    "parse_caption",
    "render",
    "sample_scene",
    "score",
]
