"""Plans: what one attention module does in the forward that runs in this thread."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, NamedTuple
from weakref import ReferenceType

from torch import Tensor, inference_mode, int64, nn, tensor

from nabla_attn.block_selection import select_blocks
from nabla_attn.config import SparseConfig
from nabla_attn.core.block_map import BlockMap
from nabla_attn.core.grid import BlockShape, TokenGrid
from nabla_attn.core.losses import BlockCall
from nabla_attn.core.order import TokenLayout, text_entries, to_blocks
from nabla_attn.methods import Moment
from nabla_attn.models.context_parallel import Ranks
from nabla_attn.models.map_cache import MapCache


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything an attention call needs beside its tensors; hashable.

    Attributes:
        grid: The video's tokens.
        config: Which blocks are kept.
        text: Where joint text tokens stand: "before" or "after" the video, or None for no text.
        prefix: Number of always-kept tokens in front of the video besides text (history frames).
        is_block_order: Whether the model already brings its tokens in block order.
        backend: The backend's name.
        telemetry: Whether density and kept mass are measured.
        ranks: The processes that share the sequence; None is this one alone.
        layer: The layer, where it keeps its maps or somebody observes it.
        branch: Which of the kept maps belongs to this call; None builds every map anew.
        moment: Step and layer, where a method depends on them.
        memory: Generation, stage and call of the step, where a method keeps something between
            steps.
        guidance_batch: Samples of a batch that is the two halves of classifier-free guidance, the
            conditional last, where one map serves both; 0 where none does. A cache of diffusers
            may leave out the first half, and then each sample has its own.
        heads: The heads of the layer that the plan is for; None is all.
        groups: Plans of some heads each, all heads together, where they differ; the plan then says
            only what these share.
        weights: Names of the trained parameters that a call brings, each behind its method's.
    """

    grid: TokenGrid
    config: SparseConfig
    text: str | None = None
    prefix: int = 0
    is_block_order: bool = False
    backend: str = "auto"
    telemetry: bool = False
    ranks: Ranks | None = None
    layer: "ReferenceType[Layer] | None" = None
    branch: int | None = None
    moment: Moment | None = None
    memory: tuple[int, int, int] | None = None
    guidance_batch: int = 0
    heads: tuple[int, ...] | None = None
    groups: "tuple[Plan, ...]" = ()
    weights: tuple[tuple[str, str], ...] = ()

    @property
    def is_dense(self) -> bool:
        """Whether no head drops anything."""
        return self.config.is_dense and not self.groups

    def with_config(self, config: SparseConfig) -> "Plan":
        """The same call with another algorithm, in the blocks that it asks for.

        Raises:
            ValueError: The model's tokens come in other blocks.
        """
        block = BlockShape(*(config.block or ()))
        grid = replace(self.grid, block=block, order=config.order)
        if grid != self.grid and self.is_block_order:
            raise ValueError(
                f"this model brings its tokens in blocks of {self.grid.block}: got {config}. Drop "
                "the block and the order from the algorithm."
            )
        return replace(self, config=config, grid=grid)

    def layout(self, num_tokens: int) -> TokenLayout:
        """The layout of the whole sequence, of which a call has `num_tokens`.

        With ranks, a call has their share of the video.

        Raises:
            ValueError: The call's tokens do not fit the grid.
        """
        share = self.grid.num_tokens // (self.ranks.count if self.ranks else 1)
        num_text = num_tokens - share - self.prefix
        if num_text < 0 or (num_text > 0 and self.text is None):
            extra = f" + {self.prefix} in front" if self.prefix else ""
            ranks = f" over {self.ranks.count} ranks" if self.ranks else ""
            text = " and no joint text" if self.text is None else ""
            raise ValueError(
                f"tokens do not match the grid: got {num_tokens} tokens for {self.grid}{ranks} = "
                f"{share}{extra}{text}. Register the model with the grid and the "
                "text of its attention (nabla_attn.register_model)."
            )
        before, after = (num_text, 0) if self.text == "before" else (0, num_text)
        return TokenLayout(self.grid, self.prefix + before, after)


# Compiled graphs take the plan as a tensor that holds its number here, so that no change of step,
# layer, threshold or window is a new graph. Training draws thresholds at random: old plans go.
_PLANS: dict[int, Plan] = {}
_KEYS: OrderedDict[Plan, Tensor] = OrderedDict()
_NUMBERS = count()
_LOCK = threading.Lock()
MAX_PLANS = 4096


def plan_key(plan: Plan) -> Tensor:
    """The 0-d int64 CPU tensor that stands for `plan` in attention calls."""
    with _LOCK:
        key = _KEYS.get(plan)
        if key is not None:
            _KEYS.move_to_end(plan)
            return key
        with inference_mode(False):
            key = tensor(next(_NUMBERS), dtype=int64, device="cpu")
        _KEYS[plan] = key
        _PLANS[int(key)] = plan
        if len(_KEYS) > MAX_PLANS:
            _, oldest = _KEYS.popitem(last=False)
            del _PLANS[int(oldest)]
        return key


def plan_of(key: Tensor) -> Plan:
    """The plan a key stands for."""
    return _PLANS[int(key)]


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionCall:
    """One sparse attention call and the map that it used, as observers receive it.

    Tokens are in raster order, unless the model brings them in block order (Kandinsky 6 SR).

    Attributes:
        model: The transformer's name in its pipeline.
        layer: Number of the attention layer in the model, from 0.
        step: Denoising step from 0; None with gradients.
        heads: The heads of the layer that the call has, where its heads run several algorithms: one
            call for each of these. None is all.
        q: Queries [batch, heads, tokens, dim], rotary embedding applied.
        k: Keys, like q.
        v: Values, like q.
        layout: Where the video's tokens and the text's are.
        config: Which blocks are kept.
        block_map: The map, text included.
        text_valid: Bool [batch, text tokens or all tokens], False at padding; None is no padding.
        scale: Factor on q.k; None is 1/sqrt(dim).
        is_block_order: Whether the model brought its tokens in block order.
    """

    model: str
    layer: int
    step: int | None
    heads: tuple[int, ...] | None = None
    q: Tensor
    k: Tensor
    v: Tensor
    layout: TokenLayout
    config: SparseConfig
    block_map: BlockMap
    text_valid: Tensor | None
    scale: float | None
    is_block_order: bool

    @property
    def factor(self) -> float:
        """The factor on q.k, as a number."""
        return self.q.shape[-1] ** -0.5 if self.scale is None else self.scale

    @property
    def head_index(self) -> "slice | Tensor":
        """What picks the call's heads among all of the layer's, on the CPU."""
        return slice(None) if self.heads is None else tensor(self.heads)

    def last_sample(self, config: SparseConfig | None = None) -> BlockCall:
        """The last sample of the batch in block order.

        Under classifier-free guidance in one batch, it is the one with the prompt.

        Args:
            config: Another algorithm, whose map is built from the same queries and keys; None is
                the map that was used.

        Raises:
            ValueError: The model brings its tokens in other blocks than the algorithm asks for.
        """
        q, k, v, layout = self.last_in_blocks(config)
        if config is None:
            block_map = self.block_map.sample(-1)
        else:
            valid = None if self.text_valid is None else text_entries(self.text_valid[-1:], layout)
            moment = Moment(step=self.step, layer=self.layer)
            options = {"scale": self.scale, "text_valid": valid, "v": v, "moment": moment}
            block_map = select_blocks(q, k, layout, config, **options)  # type: ignore[arg-type]
        tail = (self.config if config is None else config).tail
        return BlockCall(q, k, v, layout, block_map, self.factor, tail)

    def last_in_blocks(
        self, config: SparseConfig | None = None
    ) -> tuple[Tensor, Tensor, Tensor, TokenLayout]:
        """Queries, keys and values of the last sample in block order, and that order's layout.

        Args:
            config: The algorithm whose blocks are meant; None is the call's own.

        Raises:
            ValueError: The model brings its tokens in other blocks than the algorithm asks for.
        """
        layout = self.layout
        if config is not None:
            layout = replace(layout, grid=layout.grid.with_block(config.block, config.order))
            if self.is_block_order and layout != self.layout:
                raise ValueError(f"{self.model} brings its tokens in other blocks: got {config}.")
        q, k, v = (x[-1:] for x in (self.q, self.k, self.v))
        if not self.is_block_order:
            q, k, v = (to_blocks(x, layout) for x in (q, k, v))
        return q, k, v, layout


Observer = Callable[[AttentionCall], None]


class Snapshot(NamedTuple):
    """What a layer does in one forward."""

    is_dense: bool = True
    step: int | None = None
    key: Tensor | None = None
    stats: Tensor | None = None
    order: Tensor | None = None
    methods: tuple[str, ...] = ()
    takes_hidden: bool = False


class _Current(threading.local):
    """What a layer does in the forward of each thread; attributes as in `Layer`."""

    is_dense: bool
    step: int | None
    key: Tensor | None
    stats: Tensor | None
    order: Tensor | None
    methods: tuple[str, ...]
    takes_hidden: bool

    def __init__(self) -> None:
        self.hidden: Tensor | None = None
        self.restore(Snapshot())

    def snapshot(self) -> Snapshot:
        return Snapshot(*(getattr(self, name) for name in Snapshot._fields))

    def restore(self, snapshot: Snapshot) -> None:
        self.__dict__.update(snapshot._asdict())


class Layer:
    """One attention module under NABLA.

    What it does in a forward is kept for each thread, so that several may call one model at once.

    Args:
        path: The module's path in the model.
        model: The model's name in its pipeline.
        index: Number of the layer in the model, from 0.
        num_heads: Number of its query heads.

    Attributes:
        maps: The maps kept for later calls, where the schedule reuses them.
        observers: Called with every sparse call.
        tables: What calibration found for this layer, by the method's name.
        current: What the layer does in the forward of this thread: `is_dense`, whether it stays
            dense; `step`, the denoising step; `key`, its plan; `stats`, fp32 [3, heads] for
            density, kept mass and the tail's density, None when not measured; `order`, the heads in
            the order in which ranks take them, None as they are; `methods`, those whose trained
            parts take part; `takes_hidden`, whether these take hidden states, and `hidden`, the
            states of the call that runs.
        parts: The trained parts of methods, by their names; they belong to the attention module.
    """

    def __init__(self, path: str, *, model: str = "", index: int = 0, num_heads: int = 0) -> None:
        self.path = path
        self.model = model
        self.index = index
        self.num_heads = num_heads
        self.maps = MapCache()
        self.observers: list[Observer] = []
        self.tables: Mapping[str, Any] = {}
        self.parts: Mapping[str, nn.Module] = {}
        self._memory: dict[tuple[Any, ...], dict[str, Any]] = {}
        self.current = _Current()

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a model is nobody's to observe, and is in no forward.
        return self.__dict__ | {"observers": [], "current": None, "_memory": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"current": _Current()}

    def __repr__(self) -> str:
        return f"Layer({self.path!r}, model={self.model!r}, index={self.index})"

    def weights(self, config: SparseConfig) -> tuple[tuple[str, str], ...]:
        """The trained parameters that an algorithm uses here: the method's name and their own."""
        return tuple(
            (use.name, name)
            for use in config.uses
            if use.name in self.parts
            for name, _ in self.parts[use.name].named_parameters()
        )

    def memory(
        self, generation: int, stage: int, call: int, heads: tuple[int, ...] | None
    ) -> dict[str, Any]:
        """What methods keep between the steps of a stage; that of earlier stages is dropped."""
        for key in [key for key in self._memory if key[:2] != (generation, stage)]:
            del self._memory[key]
        return self._memory.setdefault((generation, stage, call, heads), {})

    def show(
        self,
        plan: Plan,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: TokenLayout,
        block_map: BlockMap,
        *,
        text_valid: Tensor | None,
        scale: float | None,
    ) -> None:
        """Hand a call and its map to the observers; arguments as in `AttentionCall`."""
        for observer in tuple(self.observers):
            observer(
                AttentionCall(
                    model=self.model,
                    layer=self.index,
                    step=self.current.step,
                    heads=plan.heads,
                    q=q.detach(),
                    k=k.detach(),
                    v=v.detach(),
                    layout=layout,
                    config=plan.config,
                    block_map=block_map,
                    text_valid=text_valid,
                    scale=scale,
                    is_block_order=plan.is_block_order,
                )
            )

    def snapshot(self) -> Snapshot:
        """What `restore` needs to come back to this forward."""
        return self.current.snapshot()

    def restore(self, snapshot: Snapshot) -> None:
        """Return to the forward of a snapshot."""
        self.current.restore(snapshot)
