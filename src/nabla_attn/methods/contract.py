"""What every sparse attention method is: parameters, a function that selects, and where it is from.

    select(q, k, grid, params, state) -> Selection

Tokens come and masks go in the block order of the grid; text is not among them, because it is kept
by all methods. Two kinds of methods are functions of less than q and k, and the engine
(`block_selection.select_blocks`) runs them faster for it: `static` ones know the grid alone,
`pooled` ones the probabilities of pooled blocks, a panel of rows at a time.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from nabla_attn.core.block_map import HeadOrder
from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.scores import pool_blocks, score_blocks
from nabla_attn.methods.parameters import Parameter
from nabla_attn.shapes import Bool, Float

KINDS = ("static", "pooled", "calibrated", "trained")
EXACTNESS = ("code", "paper", "reconstructed")
NEEDS = ("values", "step", "layer", "memory", "table", "hidden")


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Where in a run a call stands.

    Attributes:
        step: Denoising step from 0; None where it is not known.
        num_steps: Steps of the run; None where they are not known.
        layer: Attention layer from 0.
        num_layers: Layers of the model.
        heads: The layer's heads that this call has; None is all of them.
    """

    step: int | None = None
    num_steps: int | None = None
    layer: int = 0
    num_layers: int = 1
    heads: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class State(Moment):
    """What a method may know of a call beside its queries and keys.

    Attributes:
        scale: Factor on q.k.
        counts: Tokens of every block, int64 [blocks].
        allowed: Bool [blocks, blocks], False between packed clips; None where there is one clip.
        valid: Slots in block order that may be attended, text behind the video: bool [samples or 1,
            slots], False at empty slots and padded text; None where all may be.
        v: Values in block order, for methods that need "values"; None for all others.
        memory: What a method that needs "memory" kept in earlier steps of this generation, of this
            layer and guidance branch; it may write here.
        table: What calibration found for a method that needs a "table"; None without one.
        parts: Parameters of the method's trained parts by name, those of all heads of the layer;
            None without parts, as at their neutral element.
        hidden: Hidden states of the video's tokens in block order, zero in empty slots, for a
            method that needs "hidden" and has its parts; None otherwise.
    """

    scale: float
    counts: Tensor
    allowed: Tensor | None = None
    valid: Tensor | None = None
    v: Tensor | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    table: Mapping[str, Any] | None = None
    parts: Mapping[str, Tensor] | None = None
    hidden: Float[Tensor, "batch slots width"] | None = None


@dataclass(frozen=True, eq=False)
class Selection:
    """What a method chose.

    Attributes:
        mask: True where a query block attends a key block; leading axes of 1 stand for all.
        q_order: Where each head has queries in an order of its own, that order over the video's
            tokens in raster order; the mask's rows are its blocks.
        kv_order: The same of keys and values; with one of the two both must be given.
        text_keys: Where the order of keys leaves tokens out or repeats them, the key blocks that
            text attends, which hold each token once; None is all.
        prepare: Called with q, k, v in the order in which they are attended, text behind the video;
            returns them as they shall be, for example quantised.
        finish: Called with the output and with q, k, v in that order; returns the output. Autocast
            is off in both.
    """

    mask: Bool[Tensor, "#batch #heads q_blocks kv_blocks"]
    q_order: HeadOrder | None = None
    kv_order: HeadOrder | None = None
    text_keys: Bool[Tensor, " kv_blocks"] | None = None
    prepare: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None = None
    finish: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None


class TooManyTokensError(ValueError):
    """A video has more tokens than a method can be calibrated on."""


class Calibrator(Protocol):
    """Finds the table entry of one layer from the calls of dense runs.

    A method's `calibrate(params, grid)` makes one for each layer.
    """

    def observe(
        self,
        q: Float[Tensor, "one heads slots dim"],
        k: Float[Tensor, "one heads slots dim"],
        v: Float[Tensor, "one heads slots dim"],
        state: State,
    ) -> None:
        """Look at one call: tokens of the video in block order, and step and layer in `state`."""

    def entry(self) -> Any:
        """What was found, in plain JSON values."""


class BuildParts(Protocol):
    """Builds a method's trained parts of one layer, at the element that changes nothing."""

    def __call__(self, *, heads: int, dim: int, width: int) -> nn.Module:
        """The parts of a layer.

        Args:
            heads: Number of the layer's heads.
            dim: Numbers in a query of one head.
            width: Numbers in the hidden state of one token.
        """


Select = Callable[
    [Tensor, Tensor, TokenGrid, SimpleNamespace, State],
    Selection | Tensor,
]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method: its row in the list.

    Attributes:
        name: What an algorithm string begins with.
        title: The method in a few words.
        select: Chooses blocks; a bare mask stands for a selection.
        parameters: In the order in which an algorithm string has their values.
        check: Called with the parameters; raises ValueError where they do not go together.
        kind: One of `KINDS`: what the map depends on.
        exactness: "code" or "paper" if it equals what was published there; "reconstructed" if
            constants are ours, which `ours` names.
        ours: What is not from the source.
        paper: Its arXiv number or address.
        code: Repository@commit, file and lines.
        licence: That of the code.
        published: The algorithm string with the blocks, order and tail of the source.
        needs: Which of `NEEDS` it has.
        is_trainable: Whether gradients may flow through its output.
        keeps_constants: Whether its output is a weighted mean of values, so that constant values
            come out constant; not so with quantised values, for example.
        packs: Whether it takes several clips packed along time.
        calibrate: For methods that need a "table": from parameters and grid to what finds the
            entry of a layer.
        parts: For methods with parts that are trained: what builds them for one layer.
        takes_order: Whether its blocks may be cut from an order of tokens (`_order-`): it neither
            asks where in the video a block lies nor orders tokens itself.
        choose: For pooled methods: kept blocks of rows of probabilities that reach their targets.
        target: For pooled methods: from grid and parameters, what each row must reach.
        keep: For static methods: the mask from grid, parameters, state and device.
    """

    name: str
    title: str
    select: Select
    parameters: tuple[Parameter, ...] = ()
    check: Callable[[SimpleNamespace], None] | None = None
    kind: str = "pooled"
    exactness: str = "reconstructed"
    ours: str = ""
    paper: str = ""
    code: str = ""
    licence: str = ""
    published: str = ""
    needs: tuple[str, ...] = ()
    is_trainable: bool = True
    keeps_constants: bool = True
    packs: bool = True
    calibrate: Callable[[SimpleNamespace, TokenGrid], Calibrator] | None = None
    parts: BuildParts | None = None
    takes_order: bool = True
    choose: Callable[[Tensor, Tensor], Tensor] | None = None
    target: Callable[[TokenGrid, SimpleNamespace], list[float]] | None = None
    keep: Callable[[TokenGrid, SimpleNamespace, State, torch.device], Tensor] | None = None

    def __post_init__(self) -> None:
        choices = (("kind", (self.kind,), KINDS), ("exactness", (self.exactness,), EXACTNESS))
        for field_name, values, known in (*choices, ("needs", self.needs, NEEDS)):
            if odd := set(values) - set(known):
                raise ValueError(f"{field_name} must be of {known}: got {sorted(odd)}.")

    @property
    def form(self) -> str:
        """How it is written in an algorithm string."""
        parts = [self.name]
        for parameter in self.parameters:
            form = parameter.form
            parts.append(form if parameter.default is None else f"[{form}]")
        return "-".join(parts)

    @property
    def example(self) -> str:
        """The shortest algorithm string with it."""
        needed = (each.example for each in self.parameters if each.default is None)
        return "-".join([self.name, *needed])

    def params(self, values: tuple[Any, ...]) -> SimpleNamespace:
        """The values of a rule by the names of their parameters."""
        names = (parameter.name for parameter in self.parameters)
        return SimpleNamespace(**dict(zip(names, values, strict=True)))


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer whose outputs are zero until it is trained."""
    # Random numbers that nobody sees would move those of a training run.
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def apply_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer in the type of its input."""
    return functional.linear(x, weight.to(x.dtype), bias.to(x.dtype))


def table_of_size(name: str, grid: TokenGrid, state: State) -> Mapping[str, Any]:
    """The table of a method whose entry is for one size, as it says under "tokens" and "block".

    Raises:
        ValueError: It is for another size.
    """
    table = state.table
    assert table is not None
    sizes = [grid.frames, grid.height, grid.width]
    if table["tokens"] != sizes or table["block"] != grid.block.tokens:
        raise ValueError(
            f"the table of {name} is for {table['tokens']} tokens in blocks of {table['block']}: "
            f"got {sizes} in blocks of {grid.block.tokens}. Calibrate again for this size."
        )
    return table


def static(
    keep: Callable[[TokenGrid, SimpleNamespace, State, torch.device], Tensor], **row: Any
) -> Method:
    """A method that knows the grid, and perhaps step and layer, and no token."""

    def select(
        q: Tensor, k: Tensor, grid: TokenGrid, params: SimpleNamespace, state: State
    ) -> Tensor:
        mask = keep(grid, params, state, q.device)
        return mask if mask.dim() == 4 else mask.view(1, -1, *mask.shape[-2:])

    row = {"takes_order": False} | row
    return Method(select=select, keep=keep, kind="static", **row)


def pooled(
    choose: Callable[[Tensor, Tensor], Tensor],
    target: Callable[[TokenGrid, SimpleNamespace], list[float]],
    **row: Any,
) -> Method:
    """A method that chooses by the probabilities of pooled blocks, row by row.

    Args:
        choose: Called with probabilities [rows, blocks] and targets [rows, 1]; returns the mask.
        target: What each query block must reach, from grid and parameters.
        row: The other fields of the row.
    """
    return Method(
        select=partial(_select_pooled, choose, target), choose=choose, target=target, **row
    )


def _select_pooled(
    choose: Callable[[Tensor, Tensor], Tensor],
    target: Callable[[TokenGrid, SimpleNamespace], list[float]],
    q: Float[Tensor, "batch heads slots dim"],
    k: Float[Tensor, "batch heads slots dim"],
    grid: TokenGrid,
    params: SimpleNamespace,
    state: State,
) -> Tensor:
    """The plain form of a pooled method, all rows of all heads at once."""
    pooled_q, pooled_k = (pool_blocks(x, state.counts) for x in (q, k))
    probs = score_blocks(pooled_q, pooled_k, scale=state.scale, allowed=state.allowed)
    targets = probs.new_tensor(target(grid, params))[:, None]
    rows = probs.flatten(0, 2)
    mask = choose(rows, targets.repeat(len(rows) // len(targets), 1)).view_as(probs)
    return mask if state.allowed is None else mask & state.allowed
