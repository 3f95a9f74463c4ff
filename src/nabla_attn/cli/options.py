"""Options that several verbs share, and what follows from them."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, replace
from functools import cached_property, wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nabla_attn.cli.loading import load_quietly, quiet_libraries
from nabla_attn.cli.output import notice

if TYPE_CHECKING:
    from nabla_attn.generation.memory import MemoryEstimate
    from nabla_attn.generation.request import GenerationRequest, ModelDefaults
    from nabla_attn.schedule import Schedule

MODEL_DEFAULT = "the model's default"

Prompt = Annotated[str, typer.Option(help="What the video shows.")]
NegativePrompt = Annotated[str, typer.Option(help="What guidance steers away from.")]
Model = Annotated[
    str,
    typer.Option(help="'builtin', a diffusers directory, or the id of a model in the Hub's cache."),
]
Height = Annotated[int | None, typer.Option(help="Pixels.", show_default=MODEL_DEFAULT)]
Width = Annotated[int | None, typer.Option(help="Pixels.", show_default=MODEL_DEFAULT)]
Frames = Annotated[int | None, typer.Option(help="Video frames.", show_default=MODEL_DEFAULT)]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.", show_default=MODEL_DEFAULT)]
Guidance = Annotated[
    float | None, typer.Option(help="Guidance scale; 1 is none.", show_default=MODEL_DEFAULT)
]
Seed = Annotated[int, typer.Option(help="Seed of the starting noise.")]
Fps = Annotated[float | None, typer.Option(help="Frames per second.", show_default=MODEL_DEFAULT)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16; or fp32, bf16, fp16.")]
Prompts = Annotated[
    Path | None,
    typer.Option(
        help="Text file, one prompt a line, or JSON.", show_default="the built-in world's"
    ),
]
ScheduleFile = Annotated[
    str | None,
    typer.Option(
        "--schedule",
        help="JSON file: which steps, layers and heads run which algorithm; or builtin-fast.",
    ),
]
AllowMismatch = Annotated[
    bool,
    typer.Option(
        "--allow-mismatch",
        help="Follow a schedule calibrated for another model, size or version, with a warning.",
    ),
]
Engine = Annotated[
    str,
    typer.Option(
        help="How processes share the work: locks in the output folder, or ray, a cluster."
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1, help="With --engine ray: processes.", show_default="one for each GPU or machine"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the results as one JSON object.")]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        help="LoRA weights to put in: a folder, a .safetensors file, or 'builtin'; again for more. "
        "transformer_2=FOLDER is for the second transformer of Wan 2.2.",
        show_default=False,
    ),
]
Parts = Annotated[
    Path | None,
    typer.Option(
        help="Trained parts of methods, such as VSA's gate: a file that nabla train wrote. Its "
        "algorithm is then the default.",
        show_default=False,
    ),
]
Offload = Annotated[
    str, typer.Option(help="Keep on the GPU only what works: model, sequential or group.")
]
VaeTiling = Annotated[bool, typer.Option("--vae-tiling", help="Decode in tiles: less memory.")]
VaeSlicing = Annotated[
    bool, typer.Option("--vae-slicing", help="Decode one video of a batch at a time.")
]
Quantize = Annotated[
    str,
    typer.Option(help="Weights in fewer bits: int8 or nf4 (bitsandbytes), torchao, or a .gguf."),
]
Force = Annotated[
    bool, typer.Option("--force", help="Start even where the memory cannot be enough.")
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace what is there, instead of taking the next name."),
]


@dataclass(frozen=True, kw_only=True)
class VideoOptions:
    """The options of every verb that makes videos; None takes the model's default."""

    model: Model = "builtin"
    lora: Lora = None
    parts: Parts = None
    height: Height = None
    width: Width = None
    frames: Frames = None
    steps: Steps = None
    guidance: Guidance = None
    fps: Fps = None
    negative_prompt: NegativePrompt = ""
    schedule: ScheduleFile = None
    allow_mismatch: AllowMismatch = False
    device: Device = "auto"
    dtype: Dtype = "auto"
    offload: Offload = ""
    vae_tiling: VaeTiling = False
    vae_slicing: VaeSlicing = False
    quantize: Quantize = ""
    force: Force = False

    @cached_property
    def defaults(self) -> "ModelDefaults":
        """The model directory's own defaults, after those of parts and adapters."""
        from nabla_attn.generation.pipeline import model_directory
        from nabla_attn.generation.request import ModelDefaults

        found = ModelDefaults.load(model_directory(self.model), self.lora or ())
        if self.parts is None:
            return found
        from nabla_attn.models import algorithm_of

        return replace(found, sparse_algo=str(algorithm_of(self.parts)), schedule=None)

    @property
    def rate(self) -> float:
        """Frames per second, checked."""
        from nabla_attn.generation.video import check_fps

        return check_fps(self.defaults.fps if self.fps is None else self.fps)

    def request(self, *, prompt: str, seed: int, sparse_algo: str | None) -> "GenerationRequest":
        """A request for one video; see `make_request` for what algorithm and schedule hold."""
        from nabla_attn.generation.request import make_request

        return make_request(
            self.defaults,
            prompt=prompt,
            negative_prompt=self.negative_prompt,
            seed=seed,
            sparse_algo=sparse_algo,
            schedule=self._rules,
            height=self.height,
            width=self.width,
            frames=self.frames,
            steps=self.steps,
            guidance=self.guidance,
        )

    @property
    def _rules(self) -> "Schedule | None":
        """The schedule asked for, if any."""
        from nabla_attn.generation.schedules import load_schedule

        given = load_schedule(self.schedule) if self.schedule else None
        return given and replace(given, allow_mismatch=self.allow_mismatch or given.allow_mismatch)

    def base_request(self, *, prompt: str, seed: int) -> "GenerationRequest":
        """One whose algorithm others replace: dense, or with a schedule file's rules to keep."""
        algo = None if self.schedule else "dense"
        return self.request(prompt=prompt, seed=seed, sparse_algo=algo)

    @property
    def placement(self) -> dict[str, Any]:
        """How memory is saved, as `load_pipeline` takes it."""
        names = ("offload", "vae_tiling", "vae_slicing", "quantize")
        return {name: getattr(self, name) for name in names}

    @property
    def loading(self) -> dict[str, Any]:
        """What else `load_pipeline` takes."""
        return {"lora": self.lora or (), "parts": self.parts, **self.placement}

    def load(self, device: str = "") -> Any:
        """The pipeline, on `device` instead of the option's where one is given."""
        place = device or self.device
        return load_quietly(self.model, place, self.dtype, **self.loading)

    def load_for(self, request: "GenerationRequest") -> Any:
        """The pipeline, after a check that the machine can hold the video, and it can make it."""
        memory = self.foresee(request)
        pipeline = self.load()
        self.check(pipeline, request, memory)
        return pipeline

    def foresee(
        self, request: "GenerationRequest", given: Collection[str] = ()
    ) -> "MemoryEstimate":
        """The memory that a video takes, before anything is loaded.

        Args:
            request: The video.
            given: Frames that are given, as arguments of the pipeline's call.

        Raises:
            ValueError: The machine has less, and --force is not given; or the model does not read
                the given frames or needs others.
        """
        from nabla_attn.cost.memory import force_memory
        from nabla_attn.generation.memory import estimate_memory, refuse_too_large
        from nabla_attn.generation.pipeline import model_directory
        from nabla_attn.generation.placement import Placement, resolve_device, resolve_dtype

        quiet_libraries()
        device, placement = resolve_device(self.device), Placement(**self.placement)
        placement.check(device)
        estimate = estimate_memory(
            model_directory(self.model),
            request,
            device=device,
            dtype=resolve_dtype(self.dtype, device),
            placement=placement,
            given=given,
        )
        with force_memory(self.force):
            refuse_too_large(estimate, request, device)
        return estimate

    def check(self, pipeline: Any, request: "GenerationRequest", memory: "MemoryEstimate") -> None:
        """Refuse a video that the pipeline cannot make; say what memory it will take."""
        from nabla_attn.generation.request import check_request

        check_request(pipeline, request)
        notice("note", f"memory: {memory}.")


Verb = Callable[..., None]


def with_options(
    kind: type[Any], name: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a verb an option for each field of a dataclass, which come to it as one argument.

    Args:
        kind: The dataclass; the types of its fields are those of options.
        name: The verb's argument.
    """
    shared = [
        Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields(kind)
    ]

    def with_shared(verb: Verb) -> Verb:
        own = [entry for entry in signature(verb).parameters.values() if entry.name != name]

        @wraps(verb)
        def run(**values: Any) -> None:
            given = kind(**{entry.name: values.pop(entry.name) for entry in shared})
            verb(**{name: given}, **values)

        run.__signature__ = Signature([*own, *shared])  # type: ignore[attr-defined]
        return run

    return with_shared


def with_video_options(verb: Verb) -> Verb:
    """Give a verb the options of `VideoOptions`, which come to it as `video`."""

    @wraps(verb)
    def run(*, video: VideoOptions, **values: Any) -> None:
        if not video.force:
            return verb(video=video, **values)
        from nabla_attn.cost.memory import force_memory

        with force_memory():
            verb(video=video, **values)

    return with_options(VideoOptions, "video")(run)


def read_indices(text: str) -> tuple[int, ...] | None:
    """`"0,10,19"` as numbers; nothing as None.

    Raises:
        ValueError: The text is not whole numbers with commas between.
    """
    try:
        return tuple(int(part) for part in text.split(",")) if text.strip() else None
    except ValueError:
        raise ValueError(f"expected whole numbers such as 0,10,19: got {text!r}.") from None
