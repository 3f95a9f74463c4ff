"""The models that NABLA knows: one row each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from nabla_attn.models.grids import latent_grid
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
        text: where joint text tokens stand in the attention: "before" or "after" the video, or None.
        ports: processor class name -> port, for processors that leave no door.
        refusal: why the model cannot gain; such a row refuses.
    """

    name: str
    attention: str = ""
    grid: GridFunction = latent_grid
    text: str | None = None
    ports: Mapping[str, Port] = field(default_factory=dict)
    refusal: str | None = None

    def __post_init__(self) -> None:
        if self.text not in (None, "before", "after"):
            raise ValueError(f"text must be 'before', 'after' or None: got {self.text!r}.")
        if not self.attention and self.refusal is None:
            raise ValueError(f"{self.name} needs the attention modules: a regular expression.")


_SELF_ATTENTION = r"blocks\.\d+\.attn1"

_ROWS = [
    ModelRow(name="WanTransformer3DModel", attention=_SELF_ATTENTION),
]
_TABLE = {row.name: row for row in _ROWS}


def register_model(
    name: str,
    *,
    attention: str,
    grid: GridFunction = latent_grid,
    text: str | None = None,
    ports: Mapping[str, Port] | None = None,
) -> ModelRow:
    """Let `apply` work on a model class of your own, or replace the row of a known one.

    Args:
        name: the class name, such as "MyTransformer3DModel".
        attention: regular expression that matches the whole path of each video self-attention
            module, such as r"blocks\\.\\d+\\.attn1".
        grid: (model, arguments of its forward by name) -> (frames, height, width) in tokens. The
            default reads `hidden_states` [batch, channels, frames, height, width] and
            `config.patch_size`.
        text: where joint text stands in the attention: "before" or "after" the video, or None.
        ports: processor class name -> port, for processors that do not go through diffusers'
            attention dispatcher with their `_attention_backend` and `_parallel_config`.

    Returns:
        The new row.

    Raises:
        ValueError: `text` is not one of the three.
    """
    row = ModelRow(name=name, attention=attention, grid=grid, text=text, ports=dict(ports or {}))
    _TABLE[name] = row
    return row


def model_rows() -> list[ModelRow]:
    """All rows, refusals included, in the table's order."""
    return list(_TABLE.values())


def find_row(model: nn.Module) -> ModelRow | None:
    """The row of a model's class or of its nearest base class; None when there is none."""
    return next(
        (_TABLE[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in _TABLE), None
    )


def row_of(model: nn.Module) -> ModelRow:
    """The row of a model that NABLA can enter.

    Raises:
        ValueError: the class is unknown, or refused with the reason.
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
