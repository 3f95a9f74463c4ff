"""Context-parallel plans: which tokens diffusers shares over ranks in models that have no plan."""

from collections.abc import Callable
from typing import Any

from torch import nn

CpPlan = dict[str, Any]
"""A context-parallel plan in diffusers' form: module path to what is split or gathered there."""
Axis = int | tuple[int, int] | list[int]


def sequence_plan(
    split: dict[str, dict[str, Axis]],
    *,
    outputs: dict[str, list[int]] | None = None,
    gather: str = "proj_out",
) -> Callable[[nn.Module], CpPlan | None]:
    """A context-parallel plan in diffusers' form, for a model that has none.

    Plans are functions of the model; None from one means that it cannot be shared.

    Args:
        split: Module path -> argument -> token axis; a list for each of its tensors, or (axis,
            number of axes) for what has tokens only then.
        outputs: Module path -> token axis of each output (rotary tables).
        gather: The module after which tokens are put together again along axis 1; "{last}" in it
            is the index of the last entry of the module list. Weights behind it get whole instead
            of partial gradients on every rank.
    """

    def plan(model: nn.Module) -> CpPlan | None:
        from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

        found: CpPlan = {}
        for path, axes in (outputs or {}).items():
            if getattr(model, path, None) is not None:
                found[path] = {
                    index: ContextParallelInput(split_dim=axis, split_output=True)
                    for index, axis in enumerate(axes)
                }
        for path, arguments in split.items():
            found[path] = {name: _input(axis) for name, axis in arguments.items()}
        end = gather
        if "{last}" in gather:
            end = gather.format(last=len(model.get_submodule(gather.split(".")[0])) - 1)  # type: ignore[arg-type]
        found[end] = ContextParallelOutput(gather_dim=1, expected_dims=3)
        return found

    return plan


def _input(axis: Axis) -> Any:
    from diffusers.models._modeling_parallel import ContextParallelInput

    if isinstance(axis, list):
        return [ContextParallelInput(split_dim=each) for each in axis]
    if isinstance(axis, tuple):
        return ContextParallelInput(split_dim=axis[0], expected_dims=axis[1])
    return ContextParallelInput(split_dim=axis)


_HIDDEN: dict[str, Axis] = {"hidden_states": 1}
# One time for all tokens has two axes, one for each token three.
_TIMES: dict[str, Axis] = {"embedded_timestep": (1, 3), "temb": (1, 3)}
WAN_PLAN = sequence_plan({"blocks.0": _HIDDEN}, outputs={"rope": [1, 1]})
VACE_PLAN = sequence_plan(
    {
        "vace_blocks.*": _HIDDEN,
        "vace_blocks.0": {"control_hidden_states": 1},
        "blocks.0": _HIDDEN,
    },
    outputs={"rope": [1, 1]},
)
# diffusers' plan shares the text too, whose mask its attention over ranks then cannot follow.
LTX_PLAN = sequence_plan({"transformer_blocks.0": _HIDDEN}, outputs={"rope": [1, 1]})
JOINT_PLAN = sequence_plan({"transformer_blocks.0": _HIDDEN}, outputs={"rope": [0, 0]})


def hunyuan_plan(model: nn.Module) -> CpPlan | None:
    """None for token replacement, which finds the first frame's tokens by their position."""
    config: Any = model.config
    return None if config.image_condition_type == "token_replace" else JOINT_PLAN(model)


EASYANIMATE_PLAN = sequence_plan(
    {"transformer_blocks.0": _HIDDEN}, outputs={"rope_embedding": [0, 0]}
)
COGVIDEOX_PLAN = sequence_plan(
    {"transformer_blocks.*": {"image_rotary_emb": [0, 0]}, "transformer_blocks.0": _HIDDEN}
)
COSMOS_PLAN = sequence_plan(
    {
        "transformer_blocks.*": _TIMES | {"controlnet_residual": 1},
        "transformer_blocks.0": _HIDDEN,
        "norm_out": _TIMES,
    },
    outputs={"rope": [0, 0], "learnable_pos_embed": [1]},
)
KANDINSKY_PLAN = sequence_plan(
    {
        "visual_transformer_blocks.*": {"rope": 1},
        "visual_transformer_blocks.0": {"visual_embed": 1},
    },
    gather="visual_transformer_blocks.{last}",
)
