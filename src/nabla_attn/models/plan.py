"""Plans: what one attention module does in the current forward."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from weakref import ReferenceType

import torch
from torch import Tensor

from nabla_attn.config import SparseConfig
from nabla_attn.core.grid import BlockShape, TokenGrid
from nabla_attn.models.map_memory import MapMemory
from nabla_attn.models.parallel import Ranks


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything an attention call needs beyond its tensors; hashable.

    Attributes:
        grid: the video's tokens.
        config: which blocks are kept.
        text: where joint text tokens stand: "before" or "after" the video, or None for no text.
        prefix: always-kept tokens in front of the video besides text (history frames).
        in_block_order: the model already brings its tokens in block order.
        backend: backend name.
        keep_first_frame: every block attends the first frame.
        pair_queries: as in `nabla_attention`.
        telemetry: measure density and kept mass.
        ranks: the processes that share the sequence; None is this one alone.
        memory: where the layer keeps maps for later calls; None builds each map anew.
        branch: which of the kept maps belongs to this call.
        is_guidance_batch: the batch is the two halves of classifier-free guidance, the conditional
            last, and one map serves both.
    """

    grid: TokenGrid
    config: SparseConfig
    text: str | None = None
    prefix: int = 0
    in_block_order: bool = False
    backend: str = "auto"
    keep_first_frame: bool = False
    pair_queries: str | None = None
    telemetry: bool = False
    ranks: Ranks | None = None
    memory: ReferenceType[MapMemory] | None = None
    branch: int = 0
    is_guidance_batch: bool = False

    def with_config(self, config: SparseConfig) -> "Plan":
        """The same call with another algorithm, in the blocks that it asks for.

        Raises:
            ValueError: the model's tokens come in other blocks.
        """
        block = BlockShape(*(config.block or ()))
        if block == self.grid.block:
            return replace(self, config=config)
        if self.in_block_order:
            raise ValueError(
                f"this model brings its tokens in blocks of {self.grid.block}: got {config}. Drop "
                "the block from the algorithm."
            )
        return replace(self, config=config, grid=replace(self.grid, block=block))

    def text_tokens(self, num_tokens: int) -> tuple[int, int]:
        """Tokens (before, after) the video among `num_tokens` of a call: text and history.

        With ranks, a call has their share of the video.

        Raises:
            ValueError: the call's tokens do not fit the grid.
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
        return self.prefix + before, after


# Compiled graphs take the plan as a tensor that holds its number here, so that no change of step,
# layer, threshold or window is a new graph. Training draws thresholds at random: old plans go.
_PLANS: dict[int, Plan] = {}
_KEYS: OrderedDict[Plan, Tensor] = OrderedDict()
_NUMBERS = count()
MAX_PLANS = 4096


def plan_key(plan: Plan) -> Tensor:
    """The 0-d int64 CPU tensor that stands for `plan` in attention calls."""
    key = _KEYS.get(plan)
    if key is not None:
        _KEYS.move_to_end(plan)
        return key
    with torch.inference_mode(False):
        key = torch.tensor(next(_NUMBERS), dtype=torch.int64, device="cpu")
    _KEYS[plan] = key
    _PLANS[int(key)] = plan
    if len(_KEYS) > MAX_PLANS:
        _, oldest = _KEYS.popitem(last=False)
        del _PLANS[int(oldest)]
    return key


def plan_of(key: Tensor) -> Plan:
    """The plan a key stands for."""
    return _PLANS[int(key)]


Snapshot = tuple[bool, Tensor | None, Tensor | None, Tensor | None]


class Layer:
    """The state of one attention module: what to do in this forward.

    Attributes:
        name: the module's path in the model.
        is_dense: whether this forward is dense here.
        key: the plan of this forward.
        stats: fp32 [2, heads], density and kept mass of this forward; None when not measured.
        order: the heads in the order in which ranks take them; None is as they are.
        memory: the maps kept for later calls, where the schedule reuses them.
        observer: called after each eager sparse call with (layer, q, k, v, text_valid, scale), the
            arguments of `attend`; for measuring and recording.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_dense = True
        self.key: Tensor | None = None
        self.stats: Tensor | None = None
        self.order: Tensor | None = None
        self.memory = MapMemory()
        self.observer: Callable[..., None] | None = None

    def snapshot(self) -> Snapshot:
        """What `restore` needs to come back to this forward."""
        return self.is_dense, self.key, self.stats, self.order

    def restore(self, snapshot: Snapshot) -> None:
        """Return to the forward of a snapshot."""
        self.is_dense, self.key, self.stats, self.order = snapshot
