"""Which diffusers pipeline serves which family of tasks."""

from typing import Any

from nabla_attn.wan.kinds import FAMILIES

# Share of the noise steps that the high-noise expert of Wan 2.2 takes (Wan2.2 wan/configs).
BOUNDARIES = {"t2v-2.2": 0.875, "i2v-2.2": 0.900}
IMAGE_FAMILIES = ("i2v", "flf2v", "i2v-2.2")
NEEDS_IMAGE_ENCODER = ("i2v", "flf2v")


def pipeline_class(family: str) -> Any:
    """diffusers' pipeline class for a key of ``kinds.FAMILIES``."""
    import diffusers

    if family == "vace":
        return diffusers.WanVACEPipeline
    if family in IMAGE_FAMILIES:
        return diffusers.WanImageToVideoPipeline
    return diffusers.WanPipeline


def pipeline_options(family: str) -> dict[str, Any]:
    """Arguments of the pipeline class beside its parts."""
    options: dict[str, Any] = {}
    if family in BOUNDARIES:
        options["boundary_ratio"] = BOUNDARIES[family]
    if family == "ti2v-2.2":
        options["expand_timesteps"] = True
    return options


def check_pipeline(task: str, cls: type, where: object) -> None:
    """Raise unless a diffusers directory's pipeline class serves ``task``.

    Raises:
        ValueError: the class is another task's.
    """
    family = next(family for family, tasks in FAMILIES.items() if task in tasks)
    wanted = pipeline_class(family)
    if cls is not wanted:
        raise ValueError(
            f"{where} is a {cls.__name__}, {task} needs a {wanted.__name__}. Pass another task, or "
            "the directory of a checkpoint for this one."
        )
