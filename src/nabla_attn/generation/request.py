"""What to generate, and whether a pipeline can take it."""

import inspect
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nabla_attn.config import parse
from nabla_attn.files import read_json
from nabla_attn.lora import lora_place
from nabla_attn.schedule import Schedule
from nabla_attn.sizes import (
    denoisers,
    fits_frames,
    side_multiple,
    token_grid,
    vae_strides,
)


@dataclass(frozen=True)
class GenerationRequest:
    """One video to make.

    Attributes:
        prompt: the text.
        negative_prompt: what guidance steers away from.
        height: pixels.
        width: pixels.
        frames: video frames.
        steps: denoising steps.
        guidance: classifier-free guidance scale; 1 and below means none.
        seed: seed of the starting noise.
        sparse_algo: an algorithm string such as ``"nabla-0.7"``, or ``"dense"``.
        schedule: per step and layer choices; ``None`` is the algorithm's own default.
    """

    prompt: str
    negative_prompt: str = ""
    height: int = 480
    width: int = 832
    frames: int = 81
    steps: int = 50
    guidance: float = 5.0
    seed: int = 0
    sparse_algo: str = "dense"
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        for name in ("height", "width", "frames", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        check_seed(self.seed)
        if not math.isfinite(self.guidance) or self.guidance < 0:
            raise ValueError(f"guidance must be a number from 0 up, got {self.guidance}.")
        config = parse(self.sparse_algo)
        if self.schedule is not None and self.schedule.algorithm != config:
            raise ValueError(
                f"the schedule's algorithm is {self.schedule.algorithm} and the request's "
                f"{self.sparse_algo}. Pass the same in both."
            )

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
        if self.schedule is not None:
            values["schedule"] = json.loads(self.schedule.to_json())
        return values


@dataclass(frozen=True)
class ModelDefaults:
    """What a model directory says of itself; where it says nothing, the 480p values of Wan 2.1.

    Attributes:
        height: pixels.
        width: pixels.
        frames: video frames.
        steps: denoising steps.
        guidance: guidance scale.
        fps: frames per second of the mp4.
        sparse_algo: algorithm used when none is asked for.
        schedule: rules used with it then; its algorithm is `sparse_algo`.
    """

    height: int = 480
    width: int = 832
    frames: int = 81
    steps: int = 50
    guidance: float = 5.0
    fps: float = 16
    sparse_algo: str = "dense"
    schedule: Schedule | None = None

    @classmethod
    def load(cls, directory: Path, lora: Sequence[str] = ()) -> "ModelDefaults":
        """Read ``directory/defaults.json`` if there is one; a guider says its own guidance.

        Args:
            directory: the model.
            lora: adapters, as of ``load_pipeline``; a ``defaults.json`` beside their weights comes
                before the model's.

        Raises:
            ValueError: a file is not JSON, has an unknown name or a value of the wrong type, or a
                schedule of another algorithm; or there are no such adapters.
        """
        scale = guider_scale(_read_if_there(directory / "guider" / "guider_config.json"))
        defaults = cls() if scale is None else cls(guidance=scale)
        for folder in (directory, *(lora_place(each)[1].parent for each in lora)):
            defaults = _updated(defaults, folder / "defaults.json")
        return defaults


def _updated(defaults: ModelDefaults, path: Path) -> ModelDefaults:
    """Defaults with those of a file in their place; rules go with the algorithm they are of."""
    values = _read_if_there(path)
    known = asdict(defaults)
    if not isinstance(values, dict) or (values.keys() - known.keys()):
        raise ValueError(f"{path}: expected an object with {', '.join(known)}, got {values!r}.")
    rules = values.pop("schedule", None)
    for name, value in values.items():
        wanted = str if name == "sparse_algo" else float if name in ("guidance", "fps") else int
        fits = isinstance(value, int | float) if wanted is float else isinstance(value, wanted)
        if not fits or isinstance(value, bool):
            raise ValueError(f"{path}: {name} must be {wanted.__name__}, got {value!r}.")
    schedule = None if "sparse_algo" in values else defaults.schedule
    defaults = replace(defaults, schedule=schedule, **values)
    if rules is None:
        return defaults
    return replace(defaults, schedule=_read_rules(path, rules, defaults.sparse_algo))


def _read_rules(path: Path, rules: Any, sparse_algo: str) -> Schedule:
    try:
        schedule, config = Schedule.from_dict(rules), parse(sparse_algo)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if schedule.algorithm != config:
        raise ValueError(
            f"{path}: the schedule's algorithm is {schedule.algorithm} and sparse_algo "
            f"{sparse_algo}. Write the same in both, or drop the schedule."
        )
    return schedule


def check_request(pipeline: Any, request: GenerationRequest) -> None:
    """Check a request against the pipeline; warn about settings that will have no effect.

    Raises:
        ValueError: height, width or frames the model cannot take; the nearest valid are named.
    """
    _check_size(pipeline, request)
    _check_schedule(request)
    for name in ("prompt", "negative_prompt"):
        _check_text(pipeline, name.replace("_", " "), getattr(request, name))


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
    """Return ``seed`` if torch takes it.

    Raises:
        ValueError: it is below 0, or 2**63 or more.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be between 0 and 2**63 - 1, got {seed}.")
    return seed


def _read_if_there(path: Path) -> Any:
    """What the file holds; an empty object where there is none."""
    return read_json(path) if path.is_file() else {}


def _check_size(pipeline: Any, request: GenerationRequest) -> None:
    for name, step in zip(("height", "width"), side_multiple(pipeline), strict=True):
        value = getattr(request, name)
        if value % step:
            below, above = value // step * step, (value // step + 1) * step
            raise ValueError(
                f"{name} {value} does not fit this model: it takes multiples of {step}. "
                f"Nearest: {f'{below} or {above}' if below else above}."
            )
    if not fits_frames(pipeline, request.frames):
        step, _ = vae_strides(pipeline)
        below = (request.frames - 1) // step * step + 1
        raise ValueError(
            f"frames {request.frames} does not fit this model: it takes {step}n+1. "
            f"Nearest: {below} or {below + step}."
        )
    limit = getattr(denoisers(pipeline)[0].config, "rope_max_seq_len", None)
    grid = video_tokens(pipeline, request)
    if limit is not None and max(grid) > limit:
        raise ValueError(
            f"this model's positions end at {limit} tokens along each axis, got a grid of "
            f"{'x'.join(map(str, grid))} (frames, height, width). Ask for a smaller video."
        )


def _check_schedule(request: GenerationRequest) -> None:
    schedule = request.schedule or Schedule.default(request.sparse_algo)
    dense_steps = schedule.dense_first_steps + schedule.dense_last_steps
    if not request.is_dense and dense_steps >= request.steps:
        warnings.warn(
            f"{request.sparse_algo} changes nothing here: its schedule keeps {dense_steps} steps "
            f"dense, and there are {request.steps}. Ask for more steps or pass another schedule.",
            stacklevel=3,
        )


def _check_text(pipeline: Any, name: str, text: str) -> None:
    tokenizer = getattr(pipeline, "tokenizer", None)
    limit = inspect.signature(pipeline.__call__).parameters.get("max_sequence_length")
    if tokenizer is None or limit is None or not text:
        return
    tokens = tokenizer(text, truncation=False, verbose=False).input_ids
    if len(tokens) > limit.default:
        warnings.warn(
            f"the {name} has {len(tokens)} tokens and the text encoder reads {limit.default}: "
            "the rest is ignored.",
            stacklevel=3,
        )
    if tokenizer.unk_token_id in tokens:
        known = tokenizer.unk_token_id
        words = [
            word
            for word in dict.fromkeys(text.split())
            if known in tokenizer(word, add_special_tokens=False).input_ids
        ]
        warnings.warn(
            f"the model does not know these words of the {name}: {', '.join(words[:8])}.",
            stacklevel=3,
        )
