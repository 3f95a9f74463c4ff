"""What a configuration may say: every value in its range, checked before anything is loaded."""

import math
from typing import Any

from nabla_attn.config import parse
from nabla_attn.training.config import TrainConfig
from nabla_attn.training.stages import stage_config

_CHOICES = {
    "objective.kind": ("flow", "distill"),
    "objective.times": ("uniform", "logit-normal"),
    "optim.decay": ("constant", "linear", "cosine"),
    "precision": ("float32", "bfloat16"),
    "sharding": ("none", "fsdp"),
}
# The lowest values that are allowed.
_LOWEST = {
    "steps": 1,
    "accumulation": 1,
    "context_parallel": 1,
    "max_skipped": 1,
    "data.batch": 1,
    "data.validation": 0,
    "data.clips": 1,
    "data.pack": 0,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
    "watch.log": 1,
    "watch.validate": 1,
    "watch.sample": 1,
    "watch.prompts": 0,
    "sparsity.ramp": 0,
    "lora.rank": 0,
    "optim.warmup": 0,
    "optim.weight_decay": 0,
    "optim.max_norm": 0,
    "objective.data_weight": 0,
    "objective.layer_weight": 0,
    "objective.guidance": 1,
    "seed": 0,
}
_POSITIVE = ("optim.lr", "optim.eps", "objective.logit_std", "objective.shift", "lora.alpha")
_SHARES = ("data.drop", "sparsity.dense_share", "optim.final", "ema")


def check_config(config: TrainConfig) -> None:
    """Refuse what no run can be made of.

    Raises:
        ValueError: Names the key, its range and what it got.
    """
    for key, known in _CHOICES.items():
        if (value := _value(config, key)) not in known:
            raise ValueError(f"{key} must be one of {', '.join(known)}: got {value!r}.")
    for key, lowest in _LOWEST.items():
        value = _value(config, key)
        if not math.isfinite(value) or value < lowest:
            raise ValueError(f"{key} must be {lowest} or more: got {value}.")
    for key in _POSITIVE:
        value = _value(config, key)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{key} must be more than 0: got {value}.")
    for key in _SHARES:
        if not 0 <= (value := _value(config, key)) <= 1:
            raise ValueError(f"{key} must be from 0 to 1: got {value}.")
    if not all(0 <= beta < 1 for beta in config.optim.betas):
        raise ValueError(f"optim.betas must be from 0 to less than 1: got {config.optim.betas}.")
    _check_thresholds(config)
    _check_combinations(config)
    _check_packing(config)
    _check_stages(config)


def _check_thresholds(config: TrainConfig) -> None:
    if config.sparsity.thresholds is None:
        return
    lowest, highest = config.sparsity.thresholds
    if not 0 < lowest <= highest <= 1:
        raise ValueError(
            "sparsity.thresholds must be lowest, highest from more than 0 to 1: got "
            f"{lowest}, {highest}."
        )
    algorithm = parse(config.sparsity.algorithm)
    if algorithm.threshold is None or config.sparsity.schedule is not None:
        given = config.sparsity.schedule or algorithm
        raise ValueError(
            "sparsity.thresholds are those of one NABLA algorithm for all layers: got "
            f"{given}. Use sparsity.algorithm=nabla-0.7 or another, without a schedule."
        )


def _check_combinations(config: TrainConfig) -> None:
    algorithm = parse(config.sparsity.algorithm)
    is_distilled = config.objective.kind == "distill"
    extra = config.objective.data_weight or config.objective.layer_weight
    if extra and not is_distilled:
        raise ValueError(
            "objective.data_weight and objective.layer_weight stand beside distillation. "
            "Use objective.kind=distill."
        )
    if config.sparsity.ramp and not algorithm.is_adaptive and config.sparsity.schedule is None:
        raise ValueError(
            f"sparsity.ramp lowers a threshold or a share, and {algorithm} has none. Use "
            "sparsity.ramp=0."
        )
    _check_guidance(config)
    learns_sparsity = not algorithm.is_dense or config.sparsity.schedule is not None
    if is_distilled and not learns_sparsity and not config.objective.is_guided:
        raise ValueError(
            "a dense student has nothing to learn. Set sparsity.algorithm, or objective.guidance."
        )
    if config.objective.layer_weight and (config.compile or config.gradient_checkpointing):
        raise ValueError(
            "objective.layer_weight reads the attention outputs, which compile and "
            "gradient_checkpointing hide. Turn these off."
        )
    if config.sharding == "fsdp" and config.context_parallel > 1:
        raise ValueError("fsdp with context_parallel is not supported. Use one of them.")


def _check_guidance(config: TrainConfig) -> None:
    if not config.objective.is_guided:
        return
    if config.objective.kind != "distill":
        raise ValueError(
            "objective.guidance is that of a teacher's predictions. Use objective.kind=distill."
        )
    if config.objective.layer_weight:
        raise ValueError(
            "objective.layer_weight compares attention outputs, which guidance does not guide. "
            "Use one of objective.guidance and objective.layer_weight."
        )
    if len(config.stages) > 1:
        raise ValueError(
            "objective.guidance with several stages would guide what is guided already. Use one "
            "stage."
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


def _check_stages(config: TrainConfig) -> None:
    names = [stage.name for stage in config.stages]
    if len(set(names)) != len(names) or any("/" in name or name[:1] in ("", ".") for name in names):
        raise ValueError(f"stages need names of their own, usable as folders: got {names}.")
    if config.stages and config.lora.rank:
        raise ValueError("stages hand on whole models, not adapters. Use lora.rank=0.")
    for stage in config.stages:
        check_config(stage_config(config, stage))


def _value(config: TrainConfig, key: str) -> Any:
    found: Any = config
    for name in key.split("."):
        found = getattr(found, name)
    return found
