"""A whole training job: its stages, the data and samples of each, and how its result is used."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from nabla_attn.distributed import is_first_process
from nabla_attn.files import check_writable, read_object
from nabla_attn.generation.lora import LORA_WEIGHTS
from nabla_attn.generation.model_index import find_class, read_model_index
from nabla_attn.generation.pipeline import load_pipeline, model_directory
from nabla_attn.generation.request import GenerationRequest, ModelDefaults
from nabla_attn.generation.video import Scorer
from nabla_attn.training.check import check
from nabla_attn.training.checkpoint import Checkpoints
from nabla_attn.training.config import TrainConfig, differences, to_plain
from nabla_attn.training.families import family_of, find_family
from nabla_attn.training.model import load_parts
from nabla_attn.training.samples import SampleMaker
from nabla_attn.training.sections import DataConfig
from nabla_attn.training.setup import prepare
from nabla_attn.training.sparsity import read_schedule
from nabla_attn.training.train import OnStart, refuse_begun, refuse_nested, train
from nabla_attn.training.trainer import OnLog, Sample

# Frames, height, width.
VideoSize = tuple[int, int, int]


class DrawnClips(Protocol):
    """Clips that code draws instead of reading them: how training knows a built-in world."""

    @property
    def name(self) -> str:
        """The value of `data.folder` that asks for them."""

    @property
    def scorer(self) -> Scorer:
        """Held-out prompts of the same kind, for samples."""

    def size_of(self, folder: Path) -> VideoSize | None:
        """The largest size in a folder of encoded clips that were drawn so; None for others."""

    def dataset(self, pipeline: Any, data: DataConfig, size: VideoSize, seed: int) -> Any:
        """Clips of one size, encoded by a pipeline when they are first read."""


def run_job(
    config: TrainConfig,
    folder: Path,
    drawn: DrawnClips,
    *,
    resume: bool = False,
    allow_changes: bool = False,
    on_start: OnStart = lambda stage, facts: None,
    on_log: OnLog = lambda metrics: None,
) -> Path:
    """Train all stages, each from the weights of the one before; finished ones are kept.

    Args:
        config: The configuration.
        folder: The run folder; stages have folders of their own in it.
        drawn: The built-in source of clips.
        resume: Whether to continue a run that is there.
        allow_changes: Whether to continue even though the configuration changed.
        on_start: Called before the first step of a stage with its name and what it will take.
        on_log: Called with the metrics of every logged step.

    Returns:
        The result of the last stage.

    Raises:
        ValueError: Anything in configuration, model or data does not fit, or memory is too small.
        SaveFailed: A result could not be written.
        KeyboardInterrupt: Ctrl-C or SIGTERM; a checkpoint is saved first.
    """
    with _job_folder(config, folder) as (model, stages):
        for place, _ in stages:
            refuse_begun(place, resume)
        for place, stage in stages:
            done = _finished(place, stage, allow_changes=allow_changes)
            if done is None or len(stages) == 1:
                dataset, sample = _data_and_samples(stage, model, place, drawn)
                done = train(
                    stage,
                    model,
                    place,
                    resume=resume,
                    allow_changes=allow_changes,
                    dataset=dataset,
                    on_start=on_start,
                    on_log=on_log,
                    sample=sample,
                )
            model = done
    return model


def check_job(config: TrainConfig, folder: Path, drawn: DrawnClips) -> dict[str, dict[str, str]]:
    """What each stage of a job would do, by name; nothing is trained or written.

    Raises:
        ValueError: Anything in configuration, model or data does not fit.
    """
    with _job_folder(config, folder) as (model, stages):
        facts = {}
        for place, stage in stages:
            dataset, _ = _data_and_samples(stage, model, place, drawn)
            facts[place.name] = check(prepare(stage, load_parts(model, stage.part), dataset), place)
    return facts


def has_checkpoint(config: TrainConfig, folder: Path) -> bool:
    """Whether a job that was stopped can continue."""
    places = [folder / name / "checkpoints" for name, _ in config.split()]
    return any(Checkpoints(place).latest() for place in places)


def describe_use(config: TrainConfig, result: Path) -> str:
    """How a result is loaded: options of `nabla generate`, and diffusers alone for adapters."""
    index = read_model_index(model_directory(config.model))
    kind = find_class("diffusers", index["_class_name"], result)
    image = " --image FILE" if find_family(kind, index).takes_image else ""
    if not config.lora.rank:
        return f"--model {result}{image}"
    part = "transformer_2=" if config.part == "transformer_2" else ""
    in_code = f'pipeline.{config.part}.load_lora_adapter("{result}", weight_name="{LORA_WEIGHTS}")'
    if hasattr(kind, "load_lora_weights"):
        # By default diffusers loads adapters into the first transformer.
        second = ", load_into_transformer_2=True" if part else ""
        in_code = f'pipeline.load_lora_weights("{result}"{second})'
    return f"--model {config.model} --lora {part}{result}{image}, or {in_code}"


@contextmanager
def _job_folder(
    config: TrainConfig, folder: Path
) -> Iterator[tuple[Path, list[tuple[Path, TrainConfig]]]]:
    """The model and the stages of a job in a folder that can be written; none is left empty."""
    model = model_directory(config.model)
    refuse_nested(config, model, folder)
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        check_writable(folder / "config.json")
        yield model, [(folder / name, stage) for name, stage in config.split()]
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{str(error).splitlines()[0]} Use gradient_checkpointing=true, precision=bfloat16, "
            "lora.rank=16, a smaller data.batch with accumulation, or smaller clips."
        ) from error
    finally:
        if is_first_process():
            _remove_empty([*(folder / name for name, _ in config.split() if name), *made])


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders that hold nothing, or only the lock of a run that has not begun."""
    for place in folders:
        if not place.is_dir() or any(path.name != ".lock" for path in place.iterdir()):
            continue
        (place / ".lock").unlink(missing_ok=True)
        place.rmdir()


def _finished(folder: Path, config: TrainConfig, *, allow_changes: bool) -> Path | None:
    """The result of a stage that is done; None if it has to run.

    Raises:
        ValueError: It was made with another configuration.
    """
    result = folder / "pipeline"
    if not (result.is_dir() and (folder / "training.json").is_file()):
        return None
    changes = differences(read_object(folder / "config.json"), to_plain(config))
    if changes and not allow_changes:
        raise ValueError(
            f"{folder} was trained differently: {'; '.join(changes)}. Pass --allow-changes to keep "
            "it, or choose another --output."
        )
    return result


def _data_and_samples(
    config: TrainConfig, model: Path, folder: Path, drawn: DrawnClips
) -> tuple[Any, Sample | None]:
    """The dataset where clips are drawn, and samples where they are of that kind; else None."""
    is_drawn = config.data.folder == drawn.name
    size = None if is_drawn else drawn.size_of(Path(config.data.folder))
    if not is_drawn and size is None:
        return None, None
    pipeline = load_pipeline(str(model), device="cpu", dtype="float32")
    dataset = None
    if size is None:
        defaults, data = ModelDefaults.load(model), config.data
        size = (
            data.frames or defaults.frames,
            data.height or defaults.height,
            data.width or defaults.width,
        )
        dataset = drawn.dataset(pipeline, data, size, config.seed)
    return dataset, make_sampler(config, model, folder, pipeline, size, drawn.scorer)


def make_sampler(
    config: TrainConfig,
    model: Path,
    folder: Path,
    pipeline: Any,
    size: VideoSize,
    scorer: Scorer,
) -> Sample | None:
    """A function that generates and scores held-out prompts; None on other processes than the first
    and where samples cannot be made."""
    if not config.watch.prompts or not is_first_process():
        return None
    if family_of(pipeline).takes_image:
        warnings.warn("no samples are made of pipelines that take an image.", stacklevel=2)
        return None
    if config.sharding == "fsdp" or config.context_parallel > 1:
        # One process generates, and it holds only a part of such a model.
        warnings.warn("no samples are made with sharding or context_parallel.", stacklevel=2)
        return None
    defaults = ModelDefaults.load(model)
    schedule = read_schedule(config.sparsity) if config.sparsity.schedule else None
    frames, height, width = size
    request = GenerationRequest(
        prompt="",
        frames=frames,
        height=height,
        width=width,
        steps=defaults.steps,
        guidance=1.0 if config.objective.is_guided else defaults.guidance,
        sparse_algo=str(schedule.algorithm) if schedule else config.sparsity.algorithm,
        schedule=schedule,
    )
    samples = folder / "samples"
    return SampleMaker(pipeline, request, scorer, config.watch.prompts, samples, config.part)
