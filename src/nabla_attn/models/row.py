"""How NABLA enters one model class: a row of the table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from nabla_attn.models import grids, sharing
from nabla_attn.models.processor import Port

# (model, arguments of its forward by name) -> tokens of the video along (frames, height, width).
GridFunction = Callable[[nn.Module, Mapping[str, Any]], tuple[int, int, int]]


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """How NABLA enters one model class.

    Attributes:
        name: the class, and its subclasses without a row of their own.
        attention: regular expression that matches the whole path of each video self-attention.
        grid: tokens of the video from the arguments of the model's forward.
        text: where joint text tokens stand in the attention: "before" or "after" the video, or
            None for no text.
        prefix: number of always-kept tokens in front of the video from the arguments (history).
        ports: processor class name -> port, for processors that leave no door.
        guidance_in_batch: its pipelines run classifier-free guidance in one batch, the conditional
            half last; otherwise as calls of their own.
        in_block_order: the model brings its tokens in block order already.
        without: arguments of the forward that are replaced by None (the model's own sparsity).
        cp_plan: model -> context-parallel plan, where diffusers has none or one that does not work.
        cp_trains: whether gradients under that plan are those of one process, summed over ranks.
        no_ranks: why several processes cannot share one video.
        refusal: why the model cannot gain; such a row refuses.
    """

    name: str
    attention: str = ""
    grid: GridFunction = grids.latent_grid
    text: str | None = None
    prefix: Callable[[nn.Module, Mapping[str, Any]], int] | None = None
    ports: Mapping[str, Port] = field(default_factory=dict)
    guidance_in_batch: bool = False
    in_block_order: bool = False
    without: tuple[str, ...] = ()
    cp_plan: Callable[[nn.Module], sharing.Plan | None] | None = None
    cp_trains: bool = True
    no_ranks: str | None = None
    refusal: str | None = None

    def __post_init__(self) -> None:
        if self.text not in (None, "before", "after"):
            raise ValueError(f"text must be 'before', 'after' or None: got {self.text!r}.")
        if not self.attention and self.refusal is None:
            raise ValueError(f"{self.name} needs the attention modules: a regular expression.")
