"""``nabla train`` for any model: read the configuration, load, check or train, show."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from nabla_attn.training.config import TrainConfig
    from nabla_attn.training.logbook import Entry

WORLD = "world"


def train_model(
    recipe: str,
    values: list[str],
    config_file: Path | None,
    folder: Path,
    *,
    resume: bool = False,
    check: bool = False,
    allow_changes: bool = False,
) -> None:
    """Train, or only check.

    Raises:
        ValueError: Anything in configuration, model or data does not fit.
    """
    config = read_config(recipe, values, config_file)
    from nabla_attn.cli.options import quiet_libraries
    from nabla_attn.files import check_writable
    from nabla_attn.generation.pipeline import model_directory
    from nabla_attn.training.overrides import to_plain
    from nabla_attn.training.stages import finished_stage, split_stages
    from nabla_attn.training.train import refuse_begun, refuse_nested

    model = model_directory(config.model)
    refuse_nested(config, model, folder)
    check_writable(folder / "config.json")
    stages = [(folder / name, stage) for name, stage in split_stages(config)]
    if not check:
        for place, _ in stages:
            refuse_begun(place, resume)
    _show_config(config)
    quiet_libraries()
    for place, stage in stages:
        if check:
            with _within_memory():
                _show_check(stage, model, place)
            continue
        done = finished_stage(place, to_plain(stage), allow_changes=allow_changes)
        if done is None or len(stages) == 1:
            with _within_memory():
                done = _train(stage, model, place, resume=resume, allow_changes=allow_changes)
        model = done
    if not check and _is_main():
        typer.echo(f"{model}: done. Use it: {_use(config, model)}.")
        if config.objective.is_guided:
            typer.echo("it predicts what guidance gave: use it with guidance 1, which is faster.")


def _use(config: "TrainConfig", result: Path) -> str:
    """How a result is loaded."""
    import diffusers

    from nabla_attn.generation.model_index import read_model_index
    from nabla_attn.generation.pipeline import model_directory
    from nabla_attn.training.families import find_family

    index = read_model_index(model_directory(config.model))
    kind = getattr(diffusers, index["_class_name"])
    image = " --image FILE" if find_family(kind, index).takes_image else ""
    if not config.lora.rank:
        return f"--model {result}{image}"
    part = "transformer_2=" if config.part == "transformer_2" else ""
    return (
        f"--model {config.model} --lora {part}{result}{image}, or {_in_code(config, kind, result)}"
    )


def _in_code(config: "TrainConfig", kind: type, result: Path) -> str:
    """How adapters are loaded with diffusers alone."""
    from nabla_attn.generation.lora import LORA_WEIGHTS

    if not hasattr(kind, "load_lora_weights"):
        part = f"pipeline.{config.part}"
        return f'{part}.load_lora_adapter("{result}", weight_name="{LORA_WEIGHTS}")'
    # diffusers puts adapters into the first transformer unless it is told.
    second = ", load_into_transformer_2=True" if config.part == "transformer_2" else ""
    return f'pipeline.load_lora_weights("{result}"{second})'


@contextmanager
def _within_memory() -> Iterator[None]:
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{str(error).splitlines()[0]} Use gradient_checkpointing=true, precision=bfloat16, "
            "lora.rank=16, a smaller data.batch with accumulation, or smaller clips."
        ) from error


def _train(
    config: "TrainConfig", model: Path, folder: Path, *, resume: bool, allow_changes: bool
) -> Path:
    from nabla_attn.training.checkpoint import Checkpoints
    from nabla_attn.training.train import train

    dataset, sample = _world(config, model, folder)
    try:
        with _bar(config, folder.name) as report:
            return train(
                config,
                model,
                folder,
                resume=resume,
                allow_changes=allow_changes,
                dataset=dataset,
                report=report,
                sample=sample,
            )
    except KeyboardInterrupt:
        if _is_main() and Checkpoints(folder / "checkpoints").latest():
            typer.echo(f"{folder}: saved. The same command with --resume goes on.", err=True)
        raise


def read_config(recipe: str, values: list[str], config_file: Path | None) -> "TrainConfig":
    """A recipe with the overrides of a YAML file and then those of the command line."""
    from nabla_attn.training.overrides import override, read_override, read_yaml
    from nabla_attn.training.recipes import find_recipe

    config = find_recipe(recipe)
    if config_file is not None:
        config = override(config, read_yaml(config_file))
    merged: dict[str, Any] = {}
    for value in values:
        merged |= read_override(value)
    config = override(config, merged)
    folders = [stage.folder for stage in config.stages] or [None]
    if not config.data.folder and not all(folders):
        if config.model != "builtin":
            raise ValueError(
                "no data: set data.folder=DIR to clips that `nabla encode` has written with "
                f"{config.model}, or to world for the built-in world."
            )
        config = replace(config, data=replace(config.data, folder=WORLD))
    return config


def _world(config: "TrainConfig", model: Path, folder: Path) -> tuple[Any, Any]:
    """Data and samples where the built-in world is what is trained on, else nothing of both."""
    from nabla_attn.generation.request import ModelDefaults
    from nabla_attn.training.data import WorldSet
    from nabla_attn.training.data.origin import world_size

    data = config.data
    size = None if data.folder == WORLD else world_size(Path(data.folder))
    if data.folder != WORLD and size is None:
        return None, None
    from nabla_attn.cli.options import load_quietly

    pipeline = load_quietly(str(model), "cpu", "float32")
    dataset = None
    if size is None:
        defaults = ModelDefaults.load(model)
        size = (
            data.frames or defaults.frames,
            data.height or defaults.height,
            data.width or defaults.width,
        )
        frames, height, width = size
        dataset = WorldSet(
            pipeline,
            clips=data.clips,
            frames=frames,
            height=height,
            width=width,
            seed=config.seed,
            shapes=data.shapes,
        )
    return dataset, _sampler(config, model, folder, pipeline, size)


def _sampler(
    config: "TrainConfig", model: Path, folder: Path, pipeline: Any, size: tuple[int, int, int]
) -> Any:
    """What generates held-out prompts of the world and judges them, on the first process."""
    if not config.watch.prompts or not _is_main():
        return None
    from nabla_attn.generation.request import GenerationRequest, ModelDefaults
    from nabla_attn.moving_shapes.scorer import MovingShapesScorer
    from nabla_attn.training.families import family_of
    from nabla_attn.training.samples import SampleMaker
    from nabla_attn.training.sparsity import read_schedule

    if family_of(pipeline).takes_image:
        warnings.warn("no samples are made of pipelines that take an image.", stacklevel=2)
        return None
    if config.sharding == "fsdp" or config.context_parallel > 1:
        # One process generates, and of such a model it has a part.
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
    return SampleMaker(
        pipeline,
        request,
        MovingShapesScorer(),
        config.watch.prompts,
        folder / "samples",
        config.part,
    )


def _is_main() -> bool:
    import os

    return os.environ.get("RANK", "0") == "0"


def _show_config(config: "TrainConfig") -> None:
    if not _is_main():
        return
    from nabla_attn.training.overrides import flatten, to_plain

    for key, value in flatten(to_plain(config)).items():
        typer.echo(f"{key}: {value}", err=True)


def _show_check(config: "TrainConfig", model: Path, folder: Path) -> None:
    from nabla_attn.training.check import check
    from nabla_attn.training.model import load_parts
    from nabla_attn.training.setup import prepare

    dataset, _ = _world(config, model, folder)
    run = prepare(config, load_parts(model, config.part), dataset)
    shown = check(run, folder)
    if _is_main():
        for name, text in shown.items():
            typer.echo(f"{name + ':':<11} {text}")
        typer.echo("nothing was trained or written.")


@contextmanager
def _bar(config: "TrainConfig", name: str) -> Iterator[Callable[["Entry"], None]]:
    """Yield a callback that shows steps, loss, speed, density and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True), disable=not _is_main()) as bars:
        task = bars.add_task(name, total=config.steps, numbers="")

        def show(entry: "Entry") -> None:
            bars.update(task, completed=entry.step, numbers=describe_entry(entry))

        yield show


def describe_entry(entry: "Entry") -> str:
    """Such as ``loss 0.0123  4,096 tokens/s  density 0.31 (0.22-0.40)``."""
    numbers = entry.numbers
    parts = [f"loss {numbers['loss']:.4g}", f"{numbers['tokens_per_second']:,.0f} tokens/s"]
    if entry.layers:
        low, high = min(entry.layers), max(entry.layers)
        parts.append(f"density {numbers['density']:.2f} ({low:.2f}-{high:.2f})")
    if "validation" in numbers:
        parts.append(f"validation {numbers['validation']:.4g}")
    if numbers["skipped"]:
        parts.append(f"{numbers['skipped']:.0f} skipped")
    return "  ".join(parts)
