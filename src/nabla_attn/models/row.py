"""How NABLA enters one model class: a row of the table, and the token grid of a forward."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import nn

from nabla_attn.models import cp_plans
from nabla_attn.models.processor import Port
from nabla_attn.sizes import patch_size

# (model, arguments of its forward by name) -> tokens of the video along (frames, height, width).
GridFunction = Callable[[nn.Module, Mapping[str, Any]], tuple[int, int, int]]


def latent_grid(model: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    """Latents [batch, channels, frames, height, width] cut into patches.

    Cells that do not fill a patch are dropped by the models themselves, so they are here.
    """
    return _patches(model, _latents(model, arguments).shape[2:5])


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """How NABLA enters one model class.

    Attributes:
        name: The class, and its subclasses without a row of their own.
        attention: Regular expression that matches the whole path of each video self-attention.
        grid: Tokens of the video from the arguments of the model's forward.
        text: Where joint text tokens stand in the attention: "before" or "after" the video, or
            None for no text.
        prefix: Number of always-kept tokens in front of the video from the arguments (history).
        ports: Processor class name -> port, for processors that bypass diffusers' dispatcher.
        guidance_in_batch: Its pipelines run classifier-free guidance in one batch, the conditional
            half last; otherwise as calls of their own.
        is_block_order: The model brings its tokens in block order already.
        without: Arguments of the forward that are replaced by None (the model's own sparsity).
        cp_plan: Model -> context-parallel plan, where diffusers has none or one that does not work.
        cp_trains: Whether gradients under that plan are those of one process, summed over ranks.
        no_ranks: Why several processes cannot share one video.
        refusal: Why the model cannot gain; such a row refuses.
    """

    name: str
    attention: str = ""
    grid: GridFunction = latent_grid
    text: str | None = None
    prefix: Callable[[nn.Module, Mapping[str, Any]], int] | None = None
    ports: Mapping[str, Port] = field(default_factory=dict)
    guidance_in_batch: bool = False
    is_block_order: bool = False
    without: tuple[str, ...] = ()
    cp_plan: Callable[[nn.Module], cp_plans.CpPlan | None] | None = None
    cp_trains: bool = True
    no_ranks: str | None = None
    refusal: str | None = None

    def __post_init__(self) -> None:
        if self.text not in (None, "before", "after"):
            raise ValueError(f"text must be 'before', 'after' or None: got {self.text!r}.")
        if not self.attention and self.refusal is None:
            raise ValueError(f"{self.name} needs the attention modules: a regular expression.")


def frames_first_grid(model: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    """Latents [batch, frames, channels, height, width]; a last patch of few frames counts."""
    _, frames, _, height, width = _latents(model, arguments).shape
    patch_frames, patch_height, patch_width = patch_size(model)
    return -(-frames // patch_frames), height // patch_height, width // patch_width


def channels_last_grid(model: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    """Latents [batch, frames, height, width, channels]."""
    return _patches(model, _latents(model, arguments).shape[1:4])


def named_grid(model: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    """Tokens [batch, tokens, channels] whose grid comes as num_frames, height and width.

    Raises:
        ValueError: The caller gave coordinates instead.
    """
    names = ("num_frames", "height", "width")
    missing = [name for name in names if arguments.get(name) is None]
    if missing:
        raise ValueError(
            f"{type(model).__name__} was called without {missing}, so the token grid is not known. "
            "Pass num_frames, height and width of the latents beside video_coords."
        )
    frames, height, width = (int(arguments[name]) for name in names)
    return frames, height, width


def packed_clips(arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Frames of tokens of each clip in a packed sequence: `attention_kwargs["segments"]`."""
    segments = (arguments.get("attention_kwargs") or {}).get("segments")
    return None if segments is None else tuple(segments)


def framepack_history(model: nn.Module, arguments: Mapping[str, Any]) -> int:
    """History tokens that FramePack puts in front of the video, in three patch sizes.

    Source: diffusers HunyuanVideoHistoryPatchEmbed (transformer_hunyuan_video_framepack.py:87).
    """
    return _history(arguments, ("latents_clean", "latents_history_2x", "latents_history_4x"))


def helios_history(model: nn.Module, arguments: Mapping[str, Any]) -> int:
    """History tokens that Helios puts in front of the video, in three patch sizes.

    Source: diffusers HeliosTransformer3DModel.forward (transformer_helios.py).
    """
    lengths = ("short", "mid", "long")
    return _history(arguments, tuple(f"latents_history_{length}" for length in lengths))


def _history(arguments: Mapping[str, Any], names: tuple[str, ...]) -> int:
    """Tokens of latents [batch, channels, frames, height, width], the nearest history first."""
    history = 0
    for name, patch in zip(names, ((1, 2, 2), (2, 4, 4), (4, 8, 8)), strict=True):
        latents = arguments.get(name)
        if latents is not None:
            sides = zip(latents.shape[2:5], patch, strict=True)
            history += prod(-(-cells // side) for cells, side in sides)
    return history


def _latents(model: nn.Module, arguments: Mapping[str, Any]) -> Any:
    if "hidden_states" not in arguments:
        raise ValueError(
            f"{type(model).__name__} was called with {list(arguments)} and no hidden_states, so "
            "the token grid is not known. Register the model with a grid= of its own arguments."
        )
    return arguments["hidden_states"]


def _patches(model: nn.Module, cells: Any) -> tuple[int, int, int]:
    frames, height, width = (
        count // side for count, side in zip(cells, patch_size(model), strict=True)
    )
    return frames, height, width
