"""What is evaluated: prompts x seeds, and whether a video shows its prompt."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nabla_attn.generation.prompt_list import read_lines
from nabla_attn.moving_shapes import describe, held_out_scenes, parse_caption
from nabla_attn.moving_shapes.scene import Scene, Shape


@dataclass(frozen=True)
class Item:
    """One prompt and seed; all algorithms make its video from the same noise.

    Attributes:
        index: the prompt's place in the list.
        prompt: the text.
        seed: seed of the noise.
    """

    index: int
    prompt: str
    seed: int

    @property
    def name(self) -> str:
        """File name without suffix."""
        return f"p{self.index:04d}-s{self.seed}"


def make_items(prompts: Sequence[str], seeds: Sequence[int]) -> list[Item]:
    """Every prompt with every seed, prompts first.

    Raises:
        ValueError: no prompts or seeds, or a repeated one.
    """
    if not prompts or not seeds:
        raise ValueError("there is nothing to evaluate: pass at least one prompt and one seed.")
    for name, values in (("prompt", prompts), ("seed", seeds)):
        if len(set(values)) != len(values):
            raise ValueError(f"a {name} is given twice; each must occur once.")
    return [Item(i, prompt, seed) for i, prompt in enumerate(prompts) for seed in seeds]


def take_prompts(path: Path | None, count: int | None) -> list[str]:
    """The first prompts of a list, or of the moving-shapes world where there is none.

    Args:
        path: as `read_prompts` takes it.
        count: how many at most; None takes all of a list and 4 of the world.

    Raises:
        ValueError: the list cannot be read or is empty, or the world has not so many.
    """
    return world_prompts(count or 4) if path is None else read_prompts(path)[:count]


def world_prompts(count: int) -> list[str]:
    """Held-out prompts of the moving-shapes world: combinations never shown in training.

    Raises:
        ValueError: there are not so many different ones.
    """
    prompts: list[str] = []
    scenes = held_out_scenes(64 * count)
    for prompt in (describe(scene) for scene in scenes):
        if prompt not in prompts:
            prompts.append(prompt)
        if len(prompts) == count:
            break
    if len(prompts) < count:
        raise ValueError(
            f"the built-in world has {len(prompts)} held-out prompts: got {count}. Ask for more "
            "videos of each with --seeds, or pass other prompts with --prompts FILE."
        )
    return prompts


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a list as of `nabla generate`, or of a JSON list of strings or VBench entries.

    Raises:
        ValueError: the file cannot be read as one of these, or a line has a seed of its own.
    """
    path = Path(path)
    if path.suffix != ".json":
        lines = read_lines(path)
        if own := [prompt for prompt, seed in lines if seed is not None]:
            raise ValueError(f"{path}: {own[0]!r} has a seed; here all prompts take --seeds.")
        return list(dict.fromkeys(prompt for prompt, _ in lines))
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(entries, list):
            raise ValueError("expected a list")
        prompts = [entry if isinstance(entry, str) else entry["prompt_en"] for entry in entries]
        if wrong := [prompt for prompt in prompts if not isinstance(prompt, str)]:
            raise ValueError(f"{wrong[0]!r} is not a text")
        if not prompts:
            raise ValueError("it holds no prompt")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read prompts from {path}: {reason}.") from error
    return list(dict.fromkeys(prompts))


def judge_prompt(frames: np.ndarray, prompt: str) -> dict[str, bool] | None:
    """Which attributes of a prompt of the moving-shapes world a video gets right.

    Attributes that the prompt does not name are left out; "all" is whether none is wrong. None for
    prompts that are not of that world.

    Args:
        frames: uint8 [frames, height, width, 3].
        prompt: the text.
    """
    from nabla_attn.moving_shapes import score

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
