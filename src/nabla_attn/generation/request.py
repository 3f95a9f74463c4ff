"""What to generate, and whether a pipeline can take it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt

from nabla_attn.config import parse
from nabla_attn.files import read_json
from nabla_attn.generation.lora import lora_place
from nabla_attn.schedule import Schedule
from nabla_attn.sizes import (
    denoisers,
    fits_frames,
    frame_step,
    side_multiple,
    token_grid,
)
from nabla_attn.validation import check_values, read_values

Count = Annotated[int, Ge(1)]


@dataclass(frozen=True)
class GenerationRequest:
    """One video to make.

    Attributes:
        prompt: The text.
        negative_prompt: The text that guidance steers away from.
        height: Pixels.
        width: Pixels.
        frames: Number of video frames.
        steps: Number of denoising steps.
        guidance: Scale of classifier-free guidance; 1 and below means none.
        guidance_2: Scale of the second transformer of Wan 2.2, which takes the low noise; None is
            that of the first.
        seed: Seed of the starting noise.
        sparse_algo: An algorithm string such as `"nabla-0.7"`, or `"dense"`.
        schedule: Choices by step and layer; None is the algorithm's own default.

    Raises:
        ValueError: A value is out of bounds, a text has half a character, the algorithm is unknown,
            or the schedule is of another one.
    """

    prompt: str
    negative_prompt: str = ""
    height: Count = 480
    width: Count = 832
    frames: Count = 81
    steps: Count = 50
    guidance: Annotated[float, Ge(0)] = 5.0
    seed: int = 0
    sparse_algo: str = "dense"
    schedule: Schedule | None = None
    guidance_2: Annotated[float, Ge(0)] | None = None

    def __post_init__(self) -> None:
        check_values(self)
        check_seed(self.seed)
        for name in ("prompt", "negative_prompt"):
            check_text(getattr(self, name), name.replace("_", " "))
        config = parse(self.sparse_algo)
        if self.schedule is not None and self.schedule.algorithm != config:
            raise ValueError(_other_algorithm(self.schedule, self.sparse_algo, "Pass"))

    @property
    def is_dense(self) -> bool:
        """Whether every attention call is dense."""
        return self.schedule is None and parse(self.sparse_algo).is_dense

    def with_algo(self, sparse_algo: str) -> "GenerationRequest":
        """The same video with another algorithm under the same schedule; dense drops it."""
        config = parse(sparse_algo)
        schedule = None
        if self.schedule is not None and not config.is_dense:
            schedule = replace(self.schedule, algorithm=config)
        return replace(self, sparse_algo=sparse_algo, schedule=schedule)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for a record."""
        values = asdict(replace(self, schedule=None))
        if self.guidance_2 is None:
            del values["guidance_2"]
        if self.schedule is not None:
            values["schedule"] = json.loads(self.schedule.to_json())
        return values


@dataclass(frozen=True)
class ModelDefaults:
    """The values that a model directory asks for; where it says nothing, those of Wan 2.1 at 480p.

    Attributes:
        height: Pixels.
        width: Pixels.
        frames: Number of video frames.
        steps: Number of denoising steps.
        guidance: Guidance scale.
        guidance_2: That of the second transformer of Wan 2.2; None is the first one's.
        fps: Frames per second of the mp4.
        sparse_algo: The algorithm where none is asked for.
        schedule: The rules used with it then; its algorithm is `sparse_algo`.
        examples: Prompts that the model answers well.
    """

    height: Count = 480
    width: Count = 832
    frames: Count = 81
    steps: Count = 50
    guidance: Annotated[float, Ge(0)] = 5.0
    fps: Annotated[float, Gt(0)] = 16
    sparse_algo: str = "dense"
    schedule: Schedule | None = None
    guidance_2: Annotated[float, Ge(0)] | None = None
    examples: Sequence[str] = ()

    @classmethod
    def load(cls, directory: Path, lora: Sequence[str] = ()) -> "ModelDefaults":
        """Read `defaults.json` of a model if there is one; a guider brings its own guidance.

        Args:
            directory: The model.
            lora: Adapters, as `load_pipeline` takes them; a `defaults.json` beside their weights
                goes before the model's.

        Raises:
            ValueError: A file is not JSON, has an unknown name or a value that does not fit, or a
                schedule of another algorithm; or there are no such adapters.
        """
        guider = directory / "guider" / "guider_config.json"
        scale = guider_scale(_read_if_there(guider))
        found = [(guider, {} if scale is None else {"guidance": scale})]
        for folder in (directory, *(lora_place(each)[1].parent for each in lora)):
            path = folder / "defaults.json"
            found.append((path, _read_if_there(path)))
        defaults = cls()
        for path, values in found:
            try:
                defaults = _updated(defaults, values)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        return defaults


def make_request(
    defaults: ModelDefaults,
    *,
    prompt: str,
    seed: int = 0,
    sparse_algo: str | None = None,
    schedule: Schedule | None = None,
    negative_prompt: str = "",
    **given: Any,
) -> GenerationRequest:
    """A request with the model's values wherever none is given.

    Args:
        defaults: The model's.
        prompt: The text.
        seed: Seed of the starting noise.
        sparse_algo: The algorithm; it replaces the schedule's own, whose other rules stay. None
            takes the schedule's, or without one the model's with the model's rules.
        schedule: Rules by step and layer.
        negative_prompt: The text that guidance steers away from.
        given: Height, width, frames, steps and guidance; None takes the model's. A guidance that
            is given holds for both transformers of Wan 2.2.
    """
    if sparse_algo is None:
        schedule = schedule or defaults.schedule
        sparse_algo = str(schedule.algorithm) if schedule else defaults.sparse_algo
    config = parse(sparse_algo)
    names = ("height", "width", "frames", "steps", "guidance")
    sizes = {
        name: getattr(defaults, name) if given.get(name) is None else given[name] for name in names
    }
    if given.get("guidance") is None:
        sizes["guidance_2"] = defaults.guidance_2
    return GenerationRequest(
        prompt=prompt,
        negative_prompt=negative_prompt,
        seed=seed,
        sparse_algo=str(config),
        schedule=None if schedule is None else replace(schedule, algorithm=config),
        **sizes,
    )


def _updated(defaults: ModelDefaults, values: Any) -> ModelDefaults:
    """Defaults with those of a file in their place; rules go with the algorithm they are of."""
    rules = values.pop("schedule", None) if isinstance(values, dict) else None
    read_values(ModelDefaults, values)
    if "guidance" in values:  # of another file than the second
        defaults = replace(defaults, guidance_2=None)
    schedule = None if "sparse_algo" in values else defaults.schedule
    defaults = replace(defaults, schedule=schedule, **values)
    config = parse(defaults.sparse_algo)
    if rules is None:
        return defaults
    schedule = Schedule.from_dict(rules)
    if schedule.algorithm != config:
        raise ValueError(_other_algorithm(schedule, defaults.sparse_algo, "Write"))
    return replace(defaults, schedule=schedule)


def _other_algorithm(schedule: Schedule, sparse_algo: str, verb: str) -> str:
    return (
        f"the schedule's algorithm is {schedule.algorithm} and sparse_algo {sparse_algo}. {verb} "
        "the same in both, or drop the schedule."
    )


def check_text(text: str, name: str) -> str:
    """Return `text` if it is whole.

    Args:
        text: A prompt or a caption.
        name: Its name in the message.

    Raises:
        ValueError: It has half a character: a lone surrogate, as a text cut inside an emoji has, or
            bytes that are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the {name} has half a character, {text[error.start]!a}, at position {error.start}: "
            "it was cut inside an emoji, or is not UTF-8. Take it out, or save the text as UTF-8."
        ) from None
    return text


def check_request(pipeline: Any, request: GenerationRequest) -> None:
    """Check a request against the pipeline.

    Raises:
        ValueError: Height, width, frames or steps the model cannot take, of which the nearest valid
            are named; or a schedule that was calibrated for another size or number of steps.
    """
    check_size(pipeline, request)
    if request.schedule is not None:
        size = video_tokens(pipeline, request)
        request.schedule.check_match(tokens=size, steps=request.steps)


def guider_scale(config: Any) -> float | None:
    """The guidance scale that a diffusers guider's config stands for; None if it has none."""
    scale = config.get("guidance_scale") if isinstance(config, Mapping) else None
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        return None
    return float(scale) if config.get("enabled", True) else 1.0


def video_tokens(pipeline: Any, request: GenerationRequest) -> tuple[int, int, int]:
    """The transformer's token grid (frames, height, width) for a request."""
    return token_grid(pipeline, request.frames, request.height, request.width)


def check_seed(seed: int) -> int:
    """Return `seed` if torch takes it.

    Raises:
        ValueError: It is below 0, or 2**63 or more.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be between 0 and 2**63 - 1, got {seed}.")
    return seed


def _read_if_there(path: Path) -> Any:
    """What the file holds; an empty object where there is none."""
    return read_json(path) if path.is_file() else {}


def check_size(pipeline: Any, request: GenerationRequest) -> None:
    """Check the size and the steps of a request against the pipeline, whose parts need no data.

    Raises:
        ValueError: The model cannot take them; the nearest valid are named.
    """
    for name, step in zip(("height", "width"), side_multiple(pipeline), strict=True):
        value = getattr(request, name)
        if value % step:
            below, above = value // step * step, (value // step + 1) * step
            raise ValueError(
                f"{name} {value} does not fit this model: it takes multiples of {step}. "
                f"Nearest: {f'{below} or {above}' if below else above}."
            )
    if not fits_frames(pipeline, request.frames):
        step = frame_step(pipeline)
        below = (request.frames - 1) // step * step + 1
        raise ValueError(
            f"frames {request.frames} does not fit this model: it takes {step}n+1. "
            f"Nearest: {below} or {below + step}."
        )
    if type(pipeline).__name__.startswith("Mochi") and request.steps < 2:
        raise ValueError(f"Mochi's noise levels need at least 2 steps, got {request.steps}.")
    limit = getattr(denoisers(pipeline)[0].config, "rope_max_seq_len", None)
    grid = video_tokens(pipeline, request)
    if limit is not None and max(grid) > limit:
        raise ValueError(
            f"this model's positions end at {limit} tokens along each axis, got a grid of "
            f"{'x'.join(map(str, grid))} (frames, height, width). Ask for a smaller video."
        )
