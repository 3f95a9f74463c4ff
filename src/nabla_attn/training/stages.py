"""Stages: one configuration after another, each from the weights of the one before."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from nabla_attn.files import read_json
from nabla_attn.training.config import StageConfig, TrainConfig


def split_stages(config: TrainConfig) -> list[tuple[str, TrainConfig]]:
    """The runs of a configuration, as (folder name, configuration); one with no name at least."""
    if not config.stages:
        return [("", config)]
    return [(stage.name, stage_config(config, stage)) for stage in config.stages]


def stage_config(config: TrainConfig, stage: StageConfig) -> TrainConfig:
    """The configuration of one stage."""

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


def finished_stage(folder: Path, config: dict[str, Any], *, allow_changes: bool) -> Path | None:
    """The result of a stage that is done; None if it has to run.

    Args:
        folder: Of the stage.
        config: Of the stage, plain.
        allow_changes: Accept a result of another configuration.

    Raises:
        ValueError: It was made with another configuration.
    """
    from nabla_attn.training.overrides import differences

    result = folder / "pipeline"
    if not (result.is_dir() and (folder / "training.json").is_file()):
        return None
    made_with = read_json(folder / "config.json")
    changes = differences(made_with, config)
    if changes and not allow_changes:
        raise ValueError(
            f"{folder} was trained differently: {'; '.join(changes)}. Pass --allow-changes to keep "
            "it, or choose another --output."
        )
    return result
