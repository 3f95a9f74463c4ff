"""What the judge of the built-in world lets pass: true videos, and pictures that a person refuses.

Writes a record of both and a sheet to look at. Every picture is a video of its scene with one
fault, drawn from the scene itself.

    python -m benchmarks.judge_eye
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from nabla_attn.files import whole_file
from nabla_attn.moving_shapes.judge import JUDGE, score
from nabla_attn.moving_shapes.outline import REACH
from nabla_attn.moving_shapes.scene import BACKGROUNDS, COLOURS, Scene, Shape, render
from nabla_attn.record import RunRecord, collect_versions

FRAMES, SIDE = 13, 128
Reach = Callable[[NDArray, NDArray], NDArray]
"""dx, dy in radii, y pointing down -> below 1 inside the outline."""


@dataclass(frozen=True)
class Picture:
    """A video, the scene it was asked for, and what is done to it."""

    name: str
    scene: Scene
    video: NDArray[np.uint8]


def _angle_noise(angle: NDArray, waves: range, seed: int) -> NDArray:
    """A random closed curve of the given waves around the circle, of standard deviation 1."""
    rng = np.random.default_rng(seed)
    phases, sizes = rng.uniform(0, 2 * np.pi, len(waves)), rng.normal(size=len(waves))
    curve = sum(
        size * np.cos(wave * angle + phase)
        for wave, phase, size in zip(waves, phases, sizes, strict=True)
    )
    return np.asarray(curve) / np.sqrt((sizes**2).sum() / 2)


def waved(reach: Reach, waves: range, amount: float, seed: int = 0) -> Reach:
    """An outline that swings in and out: few waves make a blob, many make it ragged."""
    return lambda x, y: (
        reach(x, y) / (1 + amount * _angle_noise(np.arctan2(y, x), waves, seed)).clip(0.1)
    )


def rounded_square(x: NDArray, y: NDArray) -> NDArray:
    """A square whose corners are round: a superellipse of order 4."""
    return (x**4 + y**4) ** 0.25


def boot(x: NDArray, y: NDArray) -> NDArray:
    """A square without its upper right quarter."""
    return np.where((x > 0.1) & (y < 0), 2.0, REACH["square"](x, y))


def stretched(reach: Reach) -> Reach:
    """An outline that is half again as wide as high."""
    return lambda x, y: reach(x / 1.3, y * 1.1)


def turned(reach: Reach, angle: float) -> Reach:
    """An outline turned by an angle."""
    cos, sin = np.cos(angle), np.sin(angle)
    return lambda x, y: reach(cos * x + sin * y, cos * y - sin * x)


def draw(scene: Scene, reach: Reach | None = None, frames: int = FRAMES) -> NDArray[np.uint8]:
    """The scene of one shape with another outline."""
    shape = scene.shapes[0]
    reach = reach or REACH[shape.kind]
    fine = 4  # samples a pixel and axis
    axis = (np.arange(SIDE * fine) + 0.5) / (SIDE * fine)
    background = np.array(BACKGROUNDS[scene.background], np.float32)
    colour = np.array(COLOURS[shape.colour], np.float32)
    video = []
    for time in np.linspace(0, 1, frames):
        x, y = shape.centre(time)
        dx, dy = (axis[None, :] - x) / shape.radius, (axis[:, None] - y) / shape.radius
        inside = (reach(dx, dy) < 1).reshape(SIDE, fine, SIDE, fine).mean((1, 3))
        video.append(background + inside[..., None] * (colour - background))
    return np.rint(np.stack(video)).astype(np.uint8)


def _spotted(scene: Scene, colour: str | None, radius: float, offset: float) -> NDArray[np.uint8]:
    """The true video with a round spot at an offset from the centre, both in radii."""
    shape = scene.shapes[0]
    rgb = BACKGROUNDS[scene.background] if colour is None else COLOURS[colour]
    video = render(scene, FRAMES, SIDE, SIDE)
    axis = (np.arange(SIDE) + 0.5) / SIDE
    for index, time in enumerate(np.linspace(0, 1, FRAMES)):
        x, y = shape.centre(time)
        dx, dy = (axis[None, :] - x) / shape.radius, (axis[:, None] - y) / shape.radius
        video[index][np.hypot(dx - offset, dy + offset / 4) < radius] = rgb
    return video


def accepted() -> Iterator[Picture]:
    """Videos that a person calls right."""
    for scene in _scenes():
        true = render(scene, FRAMES, SIDE, SIDE)
        yield Picture("true", scene, true)
        blurred = ndimage.gaussian_filter(true.astype(float), (0, 1.5, 1.5, 0))
        yield Picture("soft", scene, np.rint(blurred).astype(np.uint8))
        noise = np.random.default_rng(0).normal(0, 12, true.shape)
        yield Picture("noisy", scene, np.rint((blurred + noise).clip(0, 255)).astype(np.uint8))
        reach = waved(REACH[scene.shapes[0].kind], range(6, 24), 0.025)
        yield Picture("hand-drawn", scene, draw(scene, reach))


def refused() -> Iterator[Picture]:
    """Videos that a person calls wrong, though each is nearly right."""
    for seed, scene in enumerate(_scenes()):
        shape = scene.shapes[0]
        own, true = REACH[shape.kind], render(scene, FRAMES, SIDE, SIDE)
        yield Picture("blob", scene, draw(scene, waved(own, range(2, 6), 0.09, seed)))
        yield Picture("ragged", scene, draw(scene, waved(own, range(6, 24), 0.09, seed)))
        other = {"circle": rounded_square, "square": boot, "triangle": rounded_square}[shape.kind]
        yield Picture("boot" if other is boot else "rounded square", scene, draw(scene, other))
        yield Picture("stretched", scene, draw(scene, stretched(own)))
        if shape.kind != "circle":
            yield Picture("turned", scene, draw(scene, turned(own, 0.4)))
        broken = true.copy()
        broken[FRAMES // 2] = draw(scene, waved(own, range(2, 6), 0.35, seed))[FRAMES // 2]
        yield Picture("one broken frame", scene, broken)
        gone = true.copy()
        gone[FRAMES // 2] = BACKGROUNDS[scene.background]
        yield Picture("one empty frame", scene, gone)
        yield Picture("hole", scene, _spotted(scene, None, 0.25, 0.1))
        yield Picture("stain", scene, _spotted(scene, "yellow", 0.25, 0.1))
        yield Picture("fragment", scene, _spotted(scene, shape.colour, 0.22, 1.5))


def _scenes() -> list[Scene]:
    base = Shape("blue", "circle", "right", "small", 0.3, 0.5)
    return [
        Scene((replace(base, kind=kind, size=size, colour=colour),), background)
        for kind, size, colour, background in (
            ("circle", "small", "blue", "white"),
            ("circle", "large", "green", "black"),
            ("square", "small", "red", "black"),
            ("square", "large", "purple", "white"),
            ("triangle", "small", "cyan", "black"),
            ("triangle", "large", "red", "white"),
        )
    ]


def passes(right: dict[str, float]) -> bool:
    """Whether the judge finds nothing wrong."""
    return all(value for value in right.values() if isinstance(value, bool))


def draw_sheet(rows: list[tuple[str, list[tuple[Picture, dict[str, float]]]]], path: Path) -> None:
    """Every picture's middle frame under its name, with its overlap and the verdict."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 12
    lines = [
        (title, cells[start : start + columns])
        for title, cells in rows
        for start in range(0, len(cells), columns)
    ]
    figure = Figure((1.25 * columns, 1.6 * len(lines)), dpi=90, layout="constrained")
    grid = figure.subplots(len(lines), columns, squeeze=False)
    for (title, cells), line in zip(lines, grid, strict=True):
        for axes in line:
            axes.axis("off")
        for (picture, right), axes in zip(cells, line, strict=False):
            axes.imshow(picture.video[FRAMES // 2])
            verdict = "passes" if passes(right) else "refused"
            outline = f"{right['outline']:.3f} / {right['outline_min']:.3f}"
            axes.set_title(f"{picture.name}\n{outline}\n{verdict}", fontsize=6.5)
        line[0].text(-0.3, 0.5, title, transform=line[0].transAxes, rotation=90, va="center")
    with whole_file(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary), metadata={"Software": None})


def main() -> None:
    """Judge all pictures; write the record and the sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    record = Path(f"benchmarks/results/judge-{JUDGE}_pictures.json")
    parser.add_argument("--output", type=Path, default=record)
    parser.add_argument("--sheet", type=Path, default=Path("docs/quality-images/judge.png"))
    options = parser.parse_args()
    rows = [
        (title, [(picture, score(picture.video, picture.scene)) for picture in pictures])
        for title, pictures in (("a person accepts", accepted()), ("a person refuses", refused()))
    ]
    draw_sheet(rows, options.sheet)
    numbers = {
        title.rpartition(" ")[2]: [{"name": picture.name, **right} for picture, right in cells]
        for title, cells in rows
    }
    config = {"judge": JUDGE, "frames": FRAMES, "height": SIDE, "width": SIDE}
    RunRecord("judge pictures", config, 0, collect_versions(), "cpu", numbers).save(options.output)
    for title, cells in rows:
        passed = sum(passes(right) for _, right in cells)
        print(f"{title}: {passed} of {len(cells)} pass")  # noqa: T201


if __name__ == "__main__":
    main()
