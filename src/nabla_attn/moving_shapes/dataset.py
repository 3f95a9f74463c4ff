"""The built-in world as a source of clips, and as a dataset that is rendered on first use."""

import random
from collections.abc import Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from nabla_attn.files import read_object
from nabla_attn.moving_shapes.judge import MovingShapesScorer
from nabla_attn.moving_shapes.scene import Scene, centred, describe, render, sample_scene
from nabla_attn.training.data.clip import Clip
from nabla_attn.training.data.encoded import ENCODING, Item, read_index
from nabla_attn.training.data.resize import Size
from nabla_attn.training.encoders import encode_caption, encode_first_frame, encode_video
from nabla_attn.training.sections import DataConfig


def draw_scene(seed: int, index: int, shapes: tuple[int, ...] = (1,)) -> tuple[Scene, str]:
    """Scene number `index` of a seed, and a caption that may leave out what is usual.

    A shape that is alone crosses the middle, as the built-in model knows it (`centred`).

    Args:
        seed: Seed of the stream of scenes.
        index: Place in the stream; earlier scenes need not be drawn.
        shapes: Numbers of shapes, each equally likely.
    """
    rng = random.Random(f"{seed} world {index}")
    scene = centred(sample_scene(rng.getrandbits(40), rng.choice(shapes)))
    return scene, describe(scene, rng)


class WorldSource:
    """Clips of the built-in world, rendered at each of the given sizes in turn.

    Args:
        clips: Number of clips.
        sizes: Sizes, with frames, height and width each.
        seed: Seed of the scenes.
        shapes: Numbers of shapes in a scene, each equally likely.

    Raises:
        ValueError: There are no clips, or a size lacks a number.
    """

    def __init__(
        self, clips: int, sizes: tuple[Size, ...], seed: int = 0, shapes: tuple[int, ...] = (1,)
    ) -> None:
        _check(clips, shapes)
        if not sizes or any(size.frames is None or size.height is None for size in sizes):
            raise ValueError(
                "the built-in world is drawn at a size: pass frames, height and width."
            )
        self._clips, self._sizes, self._seed, self._shapes = clips, sizes, seed, shapes

    def __len__(self) -> int:
        """Number of clips."""
        return self._clips

    def identity(self) -> str:
        """A text that names everything the clips follow from."""
        shapes = ",".join(map(str, self._shapes))
        return f"world, centred, {self._clips} clips, seed {self._seed}, {shapes} shapes"

    def read(self, start: int, stop: int) -> Iterator[Clip]:
        """The clips from start to stop."""
        for index in range(start, min(stop, self._clips)):
            scene, caption = draw_scene(self._seed, index, self._shapes)
            size = self._sizes[index % len(self._sizes)]
            assert size.frames and size.height and size.width, "checked at the start"
            draw = partial(render, scene, size.frames, size.height, size.width)
            yield Clip(f"{index:06d}", caption, draw)


class WorldSet(Dataset[Item]):
    """Scenes of the built-in world, rendered and encoded on first use, then kept in memory.

    Items are those of `EncodedSet`.

    Args:
        pipeline: Pipeline that encodes them.
        clips: Number of clips.
        frames: Number of frames of a clip.
        height: Height in pixels.
        width: Width in pixels.
        seed: Seed of the scenes.
        shapes: Numbers of shapes in a scene, each equally likely.

    Attributes:
        grids: Shape of every item's latents.

    Raises:
        ValueError: There are no clips, or the model cannot take the size.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        clips: int,
        frames: int,
        height: int,
        width: int,
        seed: int = 0,
        shapes: tuple[int, ...] = (1,),
    ) -> None:
        _check(clips, shapes)
        self._pipeline, self._seed, self._shapes = pipeline, seed, shapes
        self._size: dict[str, Any] = {"frames": frames, "height": height, "width": width}
        self._encoded: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}
        self._conditions: dict[str, dict[str, Tensor]] = {}
        self._clips = clips
        self.grids = [tuple(self._encode(0)[0].shape)] * clips

    def __len__(self) -> int:
        return self._clips

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < self._clips:
            raise IndexError(f"clip {index} of {self._clips}.")
        _, caption = draw_scene(self._seed, index, self._shapes)
        latents, by_image = self._encode(index)
        return {
            "latents": latents,
            "conditions": self._condition(caption) | by_image,
            "empty": self._condition("") | by_image,
            "caption": caption,
        }

    def _encode(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents, and conditions by the first frame."""
        if index not in self._encoded:
            scene, _ = draw_scene(self._seed, index, self._shapes)
            video = render(scene, self._size["frames"], self._size["height"], self._size["width"])
            by_image = encode_first_frame(self._pipeline, video)
            self._encoded[index] = encode_video(self._pipeline, video), by_image
        return self._encoded[index]

    def _condition(self, caption: str) -> dict[str, Tensor]:
        if caption not in self._conditions:
            self._conditions[caption] = encode_caption(self._pipeline, caption, **self._size)
        return self._conditions[caption]


class MovingShapes:
    """This world as `nabla train` knows it: a `nabla_attn.training.job.DrawnClips`."""

    name = "world"
    scorer = MovingShapesScorer()

    def size_of(self, folder: Path) -> tuple[int, int, int] | None:
        """The largest (frames, height, width) of encoded clips of this world; None for others.

        Raises:
            ValueError: It is not a finished folder of encoded clips.
        """
        videos = read_index(folder)
        source = read_object(folder / ENCODING).get("source", "")
        if not str(source).startswith("world, "):
            return None
        return max((video.size for video in videos), key=prod)

    def dataset(
        self, pipeline: Any, data: DataConfig, size: tuple[int, int, int], seed: int
    ) -> WorldSet:
        """Clips of one size, rendered and encoded when they are first read."""
        frames, height, width = size
        return WorldSet(
            pipeline,
            clips=data.clips,
            frames=frames,
            height=height,
            width=width,
            seed=seed,
            shapes=data.shapes,
        )


def _check(clips: int, shapes: tuple[int, ...]) -> None:
    if clips < 1:
        raise ValueError(f"clips must be at least 1, got {clips}.")
    if not shapes or not set(shapes) <= {1, 2, 3}:
        raise ValueError(f"a scene has 1 to 3 shapes: got {shapes}.")
