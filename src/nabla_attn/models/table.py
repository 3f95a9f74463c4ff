"""The models that NABLA knows: one row each."""

from collections.abc import Mapping

from torch import nn

from nabla_attn.models import cp_plans
from nabla_attn.models.ports import (
    AllegroPort,
    CogVideoXPort,
    CosmosPort,
    EasyAnimatePort,
    HunyuanVideo15Port,
    Kandinsky6SRPort,
    MochiPort,
)
from nabla_attn.models.processor import Port
from nabla_attn.models.row import (
    GridFunction,
    ModelRow,
    channels_last_grid,
    framepack_history,
    frames_first_grid,
    helios_history,
    latent_grid,
    named_grid,
)

_WAN = r"blocks\.\d+\.attn1"
_BLOCKS = r"transformer_blocks\.\d+\.attn1"
_HUNYUAN = r"(single_)?transformer_blocks\.\d+\.attn"
_HISTORY = "the history in front of the video would be shared out with it."
_SOUND = "its sound attends the video's tokens, of which every process has a share."
_KANDINSKY = r"visual_transformer_blocks\.\d+\.self_attention"
_COGVIDEOX_PORTS = {
    "CogVideoXAttnProcessor2_0": CogVideoXPort,
    "FusedCogVideoXAttnProcessor2_0": CogVideoXPort,
}

# Video models that NABLA cannot help, and why.
_REFUSALS = {
    "LatteTransformer3DModel": (
        "it attends within a frame and along time separately, in rows too short to gain."
    ),
    "SanaVideoTransformer3DModel": (
        "its video self-attention is linear; there is no map to make sparse."
    ),
    "SanaWMTransformer3DModel": (
        "most of its video self-attention is recurrent; there is no map to make sparse."
    ),
    "SanaWMLTX2RefinerTransformer3DModel": (
        "it attends a cache of earlier windows, so its keys are not one token grid."
    ),
    "AnyFlowFARTransformer3DModel": (
        "it attends chunks causally behind a block mask of its own, and a cache of keys."
    ),
    "WanAnimate2Transformer3DModel": (
        "its keys are the video and a cached reference behind a mask of its own."
    ),
    "Cosmos3OmniTransformer": (
        "it packs video, sound and actions into one sequence with causal parts."
    ),
    "MiniMaxH3Transformer3DModel": (
        "it packs text, images, sound and video into one sequence without a token grid."
    ),
}

_ROWS = (
    ModelRow(name="WanTransformer3DModel", attention=_WAN),
    ModelRow(
        name="WanVACETransformer3DModel", attention=r"(vace_)?" + _WAN, cp_plan=cp_plans.VACE_PLAN
    ),
    ModelRow(
        name="WanAnimateTransformer3DModel",
        attention=_WAN,
        no_ranks="its face adapter works on whole frames.",
    ),
    ModelRow(name="SkyReelsV2Transformer3DModel", attention=_WAN, cp_plan=cp_plans.WAN_PLAN),
    ModelRow(name="ChronoEditTransformer3DModel", attention=_WAN),
    ModelRow(
        name="AnyFlowTransformer3DModel",
        attention=_WAN,
        grid=frames_first_grid,
        guidance_in_batch=True,
        no_ranks="each token's time is made inside it, out of reach of diffusers' plans.",
    ),
    ModelRow(
        name="HeliosTransformer3DModel",
        attention=_WAN,
        prefix=helios_history,
        no_ranks=_HISTORY,
    ),
    ModelRow(
        name="HunyuanVideoTransformer3DModel",
        attention=_HUNYUAN,
        text="after",
        cp_plan=cp_plans.hunyuan_plan,
    ),
    ModelRow(
        name="HunyuanVideoFramepackTransformer3DModel",
        attention=_HUNYUAN,
        text="after",
        prefix=framepack_history,
        no_ranks=_HISTORY,
    ),
    ModelRow(
        name="HunyuanVideo15Transformer3DModel",
        attention=r"transformer_blocks\.\d+\.attn",
        text="after",
        ports={"HunyuanVideo15AttnProcessor2_0": HunyuanVideo15Port},
        cp_plan=cp_plans.JOINT_PLAN,
    ),
    ModelRow(
        name="Kandinsky5Transformer3DModel",
        attention=_KANDINSKY,
        grid=channels_last_grid,
        without=("sparse_params",),
        cp_plan=cp_plans.KANDINSKY_PLAN,
        cp_trains=False,
    ),
    ModelRow(
        name="Kandinsky6Transformer3DModel",
        attention=r"visual_transformer_blocks\.\d+\.video_dec_block\.self_attention",
        grid=channels_last_grid,
        no_ranks=_SOUND,
    ),
    ModelRow(
        name="Kandinsky6SRTransformer3DModel",
        attention=_KANDINSKY,
        grid=channels_last_grid,
        ports={"Kandinsky6SRAttnProcessor": Kandinsky6SRPort},
        is_block_order=True,
        no_ranks="it works on small tiles. Share out the tiles instead.",
    ),
    ModelRow(
        name="CosmosTransformer3DModel",
        attention=_BLOCKS,
        ports={"CosmosAttnProcessor2_0": CosmosPort},
        cp_plan=cp_plans.COSMOS_PLAN,
    ),
    ModelRow(
        name="LTXVideoTransformer3DModel",
        attention=_BLOCKS,
        grid=named_grid,
        guidance_in_batch=True,
        cp_plan=cp_plans.LTX_PLAN,
    ),
    ModelRow(
        name="LTX2VideoTransformer3DModel",
        attention=_BLOCKS,
        grid=named_grid,
        guidance_in_batch=True,
        no_ranks=_SOUND,
    ),
    ModelRow(
        name="CogVideoXTransformer3DModel",
        guidance_in_batch=True,
        attention=_BLOCKS,
        grid=frames_first_grid,
        text="before",
        ports=_COGVIDEOX_PORTS,
        cp_plan=cp_plans.COGVIDEOX_PLAN,
    ),
    ModelRow(
        name="ConsisIDTransformer3DModel",
        guidance_in_batch=True,
        attention=_BLOCKS,
        grid=frames_first_grid,
        text="before",
        ports=_COGVIDEOX_PORTS,
        cp_plan=cp_plans.COGVIDEOX_PLAN,
    ),
    ModelRow(
        name="MochiTransformer3DModel",
        guidance_in_batch=True,
        attention=_BLOCKS,
        text="after",
        ports={"MochiAttnProcessor2_0": MochiPort},
        cp_plan=cp_plans.JOINT_PLAN,
    ),
    ModelRow(
        name="AllegroTransformer3DModel",
        guidance_in_batch=True,
        attention=_BLOCKS,
        ports={"AllegroAttnProcessor2_0": AllegroPort},
        no_ranks="its rotary positions come nested, which diffusers' plans cannot split.",
    ),
    ModelRow(
        name="EasyAnimateTransformer3DModel",
        guidance_in_batch=True,
        attention=_BLOCKS,
        text="before",
        ports={"EasyAnimateAttnProcessor2_0": EasyAnimatePort},
        cp_plan=cp_plans.EASYANIMATE_PLAN,
    ),
    ModelRow(
        name="MotifVideoTransformer3DModel",
        attention=_HUNYUAN,
        text="after",
        no_ranks="its decoder layers attend two copies of the video.",
    ),
    *(ModelRow(name=name, refusal=reason) for name, reason in _REFUSALS.items()),
)
_TABLE = {row.name: row for row in _ROWS}


def register_model(
    name: str,
    *,
    attention: str,
    grid: GridFunction = latent_grid,
    text: str | None = None,
    ports: Mapping[str, Port] | None = None,
    guidance_in_batch: bool = False,
) -> ModelRow:
    """Let `apply` work on a model class of your own, or replace the row of a known one.

    Args:
        name: The class name, such as "MyTransformer3DModel".
        attention: Regular expression that matches the whole path of each video self-attention
            module, such as r"blocks\\.\\d+\\.attn1".
        grid: (model, arguments of its forward by name) -> (frames, height, width) in tokens. The
            default reads `hidden_states` [batch, channels, frames, height, width] and
            `config.patch_size`.
        text: Where joint text stands in the attention: "before" or "after" the video, or None.
        ports: Processor class name -> port, for processors that do not go through diffusers'
            attention dispatcher with their `_attention_backend` and `_parallel_config`.
        guidance_in_batch: Classifier-free guidance comes as one batch, the conditional half last,
            and not as calls of its own; counts for schedules with `reuse_guidance`.

    Returns:
        The new row.

    Raises:
        ValueError: `text` is not one of the three.
    """
    row = ModelRow(
        name=name,
        attention=attention,
        grid=grid,
        text=text,
        ports=dict(ports or {}),
        guidance_in_batch=guidance_in_batch,
    )
    _TABLE[name] = row
    return row


def model_rows() -> list[ModelRow]:
    """All rows, refusals included, in the table's order."""
    return list(_TABLE.values())


def find_row(model: nn.Module) -> ModelRow | None:
    """The row of a model's class or of its nearest base class; None when there is none."""
    names = (cls.__name__ for cls in type(model).__mro__)
    return next((_TABLE[name] for name in names if name in _TABLE), None)


def row_of(model: nn.Module) -> ModelRow:
    """The row of a model that NABLA can enter.

    Raises:
        ValueError: The class is unknown, or refused with the reason.
    """
    row = find_row(model)
    if row is None:
        known = sorted(name for name, entry in _TABLE.items() if entry.refusal is None)
        raise ValueError(
            f"{type(model).__name__} is not a known model. Known: {', '.join(known)}. "
            "Add a class of your own with nabla_attn.register_model(...)."
        )
    if row.refusal is not None:
        raise ValueError(f"NABLA does not apply to {row.name}: {row.refusal}")
    return row
