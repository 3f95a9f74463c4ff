"""The parts of a diffusers pipeline that training needs, and the pipeline that comes out."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nabla_attn.errors import first_line
from nabla_attn.files import read_object, write_text
from nabla_attn.generation.lora import LORA_WEIGHTS
from nabla_attn.generation.model_index import find_class, named_parts, read_model_index
from nabla_attn.models import (
    METHOD_PARTS,
    is_method_part,
    named_method_parts,
    save_method_parts,
)
from nabla_attn.schedule import Schedule
from nabla_attn.training.checkpoint import whole_folder

DEFAULTS = "defaults.json"


@dataclass(frozen=True)
class Parts:
    """The transformer that is trained, and the pipeline it comes from.

    Attributes:
        directory: The pipeline directory.
        name: The transformer's folder in it.
        transformer: The transformer, float32.
        scheduler: The pipeline's scheduler.
        pipeline_class: The pipeline's class.
        index: The pipeline's `model_index.json`.
    """

    directory: Path
    name: str
    transformer: Any
    scheduler: Any
    pipeline_class: Any
    index: Mapping[str, Any] = field(default_factory=dict)


def load_parts(directory: Path, part: str = "transformer") -> Parts:
    """Load a pipeline's transformer and scheduler; its other parts stay on disk.

    Args:
        directory: A diffusers pipeline directory.
        part: The transformer's folder.

    Raises:
        ValueError: The directory is not a text-to-video pipeline, or lacks a part.
    """
    index = read_trainable(directory)
    parts = named_parts(index)
    for name in (part, "scheduler"):
        if name not in parts or not (directory / name).is_dir():
            raise ValueError(f"{directory} has no {name}. It has: {', '.join(parts)}.")
    pipeline_class = find_class("diffusers", index["_class_name"], directory)
    try:
        transformer = find_class(*parts[part], directory).from_pretrained(
            directory / part, local_files_only=True, torch_dtype=torch.float32
        )
        scheduler = find_class(*parts["scheduler"], directory).from_pretrained(
            directory / "scheduler", local_files_only=True
        )
    except Exception as error:
        reason = first_line(error)
        raise ValueError(f"{directory}: its {part} does not load ({reason}).") from error
    return Parts(directory, part, transformer, scheduler, pipeline_class, index)


def read_trainable(directory: Path) -> dict[str, Any]:
    """`model_index.json` of a pipeline directory that training data can be encoded with.

    Raises:
        ValueError: `read_model_index` refuses it, or there is no VAE or text encoder.
    """
    index = read_model_index(directory)
    parts = named_parts(index)
    for name in ("vae", "text_encoder"):
        if name not in parts or not (directory / name).is_dir():
            raise ValueError(
                f"{directory} has no {name}, and training data is encoded with it. "
                "Use a whole pipeline directory."
            )
    return index


def save_pipeline(
    parts: Parts,
    weights: dict[str, torch.Tensor],
    folder: Path,
    schedule: Schedule,
    *,
    is_guided: bool = False,
) -> None:
    """Write a whole pipeline directory with the trained transformer, or nothing.

    Other parts are hard links where the file system has them: nothing large is copied.

    Args:
        parts: The parts of the pipeline that was trained.
        weights: The trained transformer's weights, whole, or none if these are those that it came
            with; and trained parts of methods.
        folder: The directory to write; an earlier one is replaced.
        schedule: Schedule to keep in `defaults.json`, so that generation uses what was trained.
        is_guided: Whether the weights predict what guidance gave, so that generation must not guide
            again.
    """
    method_parts, weights = _split(parts, weights)
    source = parts.directory / DEFAULTS
    defaults = read_object(source) if source.is_file() else {}
    # Those of the source may be rules of another algorithm.
    defaults.pop("schedule", None)
    defaults |= _trained_defaults(schedule, is_guided=is_guided)
    skipped = shutil.ignore_patterns(*([parts.name] if weights else []), DEFAULTS)
    with whole_folder(folder) as temporary:
        shutil.copytree(
            parts.directory, temporary, copy_function=_link, ignore=skipped, dirs_exist_ok=True
        )
        if weights:
            _whole_transformer(parts, weights).save_pretrained(temporary / parts.name)
        if method_parts:
            save_method_parts(
                temporary / parts.name / METHOD_PARTS, method_parts, schedule.algorithm
            )
        _write_json(temporary / DEFAULTS, defaults)


def _split(
    parts: Parts, weights: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Trained parts of methods, named as in their file, and all other weights."""
    others = {name: value for name, value in weights.items() if not is_method_part(name)}
    return named_method_parts(parts.name, weights), others


def _whole_transformer(parts: Parts, weights: dict[str, torch.Tensor]) -> Any:
    with torch.device("meta"):
        transformer = type(parts.transformer).from_config(parts.transformer.config)
    transformer.load_state_dict(weights, assign=True)
    transformer.register_to_config(_name_or_path="")
    return transformer


def _trained_defaults(schedule: Schedule, *, is_guided: bool) -> dict[str, Any]:
    """The defaults of generation with trained weights."""
    defaults: dict[str, Any] = {"sparse_algo": str(schedule.algorithm)}
    if schedule != Schedule(algorithm=schedule.algorithm):
        defaults["schedule"] = json.loads(schedule.to_json())
    if is_guided:
        defaults["guidance"] = 1.0
    return defaults


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=2) + "\n")


def save_lora(
    parts: Parts,
    weights: dict[str, torch.Tensor],
    folder: Path,
    schedule: Schedule,
    *,
    is_guided: bool = False,
) -> None:
    """Write adapters as `pytorch_lora_weights.safetensors`, which `load_lora_weights` reads.

    Where the pipeline has no such method, its transformer's `load_lora_adapter` reads it.

    Args:
        parts: The trained parts; they name the pipeline class, whose format is written, and hold
            the adapters' settings.
        weights: The adapters' weights, as PEFT names them, and trained parts of methods.
        folder: The directory to write; an earlier one is replaced.
        schedule: Schedule to keep in `defaults.json`.
        is_guided: Whether the weights predict what guidance gave.
    """
    from diffusers.loaders import WanLoraLoaderMixin

    method_parts, weights = _split(parts, weights)
    (settings,) = parts.transformer.peft_config.values()
    # What all of them write for a transformer is the same.
    writer = getattr(
        parts.pipeline_class, "save_lora_weights", WanLoraLoaderMixin.save_lora_weights
    )
    with whole_folder(folder) as temporary:
        writer(
            temporary,
            transformer_lora_layers=weights,
            # Without it, loading takes the rank for alpha.
            transformer_lora_adapter_metadata=settings.to_dict(),
            weight_name=LORA_WEIGHTS,
        )
        if method_parts:
            save_method_parts(temporary / METHOD_PARTS, method_parts, schedule.algorithm)
        _write_json(temporary / DEFAULTS, _trained_defaults(schedule, is_guided=is_guided))


def _link(source: str, target: str) -> None:
    try:
        # The file itself: a link to a link of a download cache would point nowhere.
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)
