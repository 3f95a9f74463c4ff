"""Prompts of the moving-shapes world, and which facts of them a video shows."""

from numpy.typing import NDArray

from nabla_attn.moving_shapes.caption import describe, parse_caption
from nabla_attn.moving_shapes.judge import score
from nabla_attn.moving_shapes.scene import Scene, Shape, held_out_scenes


class MovingShapesScorer:
    """The scorer of this world; `nabla_attn.evaluation.prompts.Scorer` says what one is."""

    name = "world"

    def prompts(self, count: int) -> list[str]:
        """Different held-out prompts: combinations that training never shows.

        Raises:
            ValueError: The world has fewer.
        """
        found: list[str] = []
        for scene in held_out_scenes(64 * count):
            prompt = describe(scene)
            if prompt not in found:
                found.append(prompt)
            if len(found) == count:
                return found
        raise ValueError(
            f"the built-in world has {len(found)} held-out prompts: got {count}. Ask for more "
            "videos of each with --seeds, or pass other prompts with --prompts FILE."
        )

    def score(self, frames: NDArray, prompt: str) -> dict[str, bool] | None:
        """Whether a video gets each attribute right that its prompt names, and all of them.

        Args:
            frames: uint8 [frames, height, width, 3].
            prompt: The text.

        Returns:
            Some of "number", "colour", "shape", "direction", "size" and "background", and "all";
            None where the prompt is not of this world.
        """
        try:
            words = parse_caption(prompt)
        except ValueError:
            return None
        shapes = tuple(
            Shape(shape.colour, shape.kind, shape.direction, shape.size or "", 0.5, 0.5)
            for shape in words.shapes
        )
        right = score(frames, Scene(shapes, words.background or ""))
        if any(shape.size is None for shape in words.shapes):
            del right["size"]
        if words.background is None:
            del right["background"]
        return right | {"all": all(right.values())}
