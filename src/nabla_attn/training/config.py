"""The configuration of `nabla train`, checked as a whole, and how two of them differ."""

from collections.abc import Sequence
from dataclasses import field, replace
from typing import Any, Literal

from pydantic import TypeAdapter, model_validator
from pydantic.dataclasses import dataclass

from nabla_attn.config import parse
from nabla_attn.training.sections import (
    CONFIG,
    Algorithm,
    CheckpointConfig,
    Count,
    DataConfig,
    LoraConfig,
    Natural,
    ObjectiveConfig,
    OptimConfig,
    Positive,
    Share,
    SparsityConfig,
    Switch,
    Text,
    WatchConfig,
)


@dataclass(frozen=True, config=CONFIG)
class StageConfig:
    """One of several stages; it starts from the weights of the stage before.

    Attributes:
        name: Name of the stage and of its folder.
        steps: Number of its optimiser steps.
        folder: Its encoded clips; None takes `data.folder`, and likewise for the other values.
        batch: Number of clips in one batch.
        frames: Video frames of a clip drawn from the built-in world.
        height: Height of a drawn clip in pixels.
        width: Width of a drawn clip in pixels.
        shift: Shift of the noise levels; larger grids need more.
        algorithm: Its attention.
        lr: Its learning rate.
    """

    name: Text
    steps: Count
    folder: Text | None = None
    batch: Count | None = None
    frames: Count | None = None
    height: Count | None = None
    width: Count | None = None
    shift: Positive | None = None
    algorithm: Algorithm | None = None
    lr: Positive | None = None


@dataclass(frozen=True, config=CONFIG)
class TrainConfig:
    """Everything that a training run follows from.

    Attributes:
        recipe: Name of the recipe that the other values began as.
        model: "builtin" or a diffusers pipeline directory.
        part: The transformer to train; Wan 2.2 A14B also has a `transformer_2`.
        data: The clips.
        objective: The loss.
        sparsity: The attention.
        optim: The optimiser and its learning rate.
        steps: Number of optimiser steps.
        accumulation: Number of batches in a step of one process.
        precision: "float32" or "bfloat16" (autocast; the trained weights stay float32).
        ema: Decay of a running average of the weights, which is then what is saved; 0 keeps none.
        lora: Adapters that are trained instead of the weights.
        gradient_checkpointing: Whether activations are computed again in the backward pass.
        compile: Whether the repeated blocks are compiled.
        sharding: "none", or "fsdp" to share weights and optimiser among GPUs.
        context_parallel: Number of processes that share one sequence (Ulysses).
        checkpoint: When the run is saved.
        watch: What is measured during training.
        max_skipped: Number of steps in a row without a finite loss after which training stops.
        seed: Seed of the order, the noise, the dropped captions and the adapters.
        stages: Stages with data, steps and attention of their own; none means a single one.
    """

    recipe: Text = "finetune"
    model: Text = "builtin"
    part: Text = "transformer"
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    steps: Count = 1000
    accumulation: Count = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    ema: Share = 0.0
    lora: LoraConfig = field(default_factory=LoraConfig)
    gradient_checkpointing: Switch = False
    compile: Switch = False
    sharding: Literal["none", "fsdp"] = "none"
    context_parallel: Count = 1
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    max_skipped: Count = 10
    seed: Natural = 0
    stages: tuple[StageConfig, ...] = ()

    def split(self) -> list[tuple[str, "TrainConfig"]]:
        """The runs that this configuration asks for, as (folder name, configuration)."""
        if not self.stages:
            return [("", self)]
        return [(stage.name, _of_stage(self, stage)) for stage in self.stages]

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        _check_objective(self)
        _check_packing(self)
        if self.sparsity.parts_only and self.lora.rank:
            raise ValueError(
                "sparsity.parts_only leaves adapters without gradients. Use lora.rank=0, or train "
                "adapters and parts together without it."
            )
        if self.sharding == "fsdp" and self.context_parallel > 1:
            raise ValueError(
                "sharding=fsdp with context_parallel is not supported. Use one of them."
            )
        _check_stages(self.stages, self)
        return self


def _of_stage(config: TrainConfig, stage: StageConfig) -> TrainConfig:
    def given(*names: str) -> dict[str, Any]:
        values = {name: getattr(stage, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    return replace(
        config,
        steps=stage.steps,
        data=replace(config.data, **given("folder", "batch", "frames", "height", "width")),
        objective=replace(config.objective, **given("shift")),
        sparsity=replace(config.sparsity, **given("algorithm")),
        optim=replace(config.optim, **given("lr")),
        stages=(),
    )


def _check_objective(config: TrainConfig) -> None:
    objective = config.objective
    if objective.kind == "distill" and config.sparsity.is_dense and not objective.is_guided:
        raise ValueError(
            "a dense student has nothing to learn. Set sparsity.algorithm, or objective.guidance."
        )
    if objective.layer_weight and (config.compile or config.gradient_checkpointing):
        raise ValueError(
            "objective.layer_weight reads the attention outputs, which compile and "
            "gradient_checkpointing hide. Turn these off."
        )
    if objective.is_guided and len(config.stages) > 1:
        raise ValueError(
            "objective.guidance with several stages would guide predictions that include guidance "
            "already. Use one stage."
        )


def _check_packing(config: TrainConfig) -> None:
    if not config.data.pack:
        return
    if config.data.batch > 1:
        raise ValueError("data.pack makes one sequence of several clips. Use data.batch=1.")
    if config.compile or config.context_parallel > 1:
        raise ValueError("data.pack works without compile and context_parallel. Turn these off.")
    if config.objective.kind == "distill" and not config.lora.rank:
        raise ValueError(
            "data.pack: a dense copy as the teacher cannot keep packed clips apart. Set lora.rank, "
            "whose teacher is the student itself, or use data.pack=0."
        )
    for name in (config.sparsity.algorithm, *(stage.algorithm for stage in config.stages)):
        if name is not None and parse(name).is_dense and config.sparsity.schedule is None:
            raise ValueError(
                "data.pack: dense attention cannot keep packed clips apart. Use "
                "sparsity.algorithm=nabla-1, which is dense within each clip."
            )


def _check_stages(stages: Sequence[StageConfig], config: TrainConfig) -> None:
    names = [stage.name for stage in stages]
    if len(set(names)) != len(names) or any("/" in name or name[:1] in ("", ".") for name in names):
        raise ValueError(f"stages need names of their own, usable as folders: got {names}.")
    if stages and config.lora.rank:
        raise ValueError("stages pass on whole models, not adapters. Use lora.rank=0.")
    for stage in stages:
        # Building it checks it.
        _of_stage(config, stage)


ADAPTER = TypeAdapter(TrainConfig)


def to_plain(config: TrainConfig) -> dict[str, Any]:
    """A configuration as plain JSON values."""
    plain: dict[str, Any] = ADAPTER.dump_python(config, mode="json")
    return plain


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What changed between two plain configurations, such as `optim.lr: 1e-06 -> 1e-05`.

    A key that the old one lacks did not exist then, and had the effect of its default.
    """
    before, after = flatten(to_plain(TrainConfig())) | flatten(old), flatten(new)
    keys = [*before, *(key for key in after if key not in before)]
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in keys
        if before.get(key) != after.get(key)
    ]
