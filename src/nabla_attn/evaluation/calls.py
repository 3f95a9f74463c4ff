"""Attention calls that methods are measured on: those of a model's dense videos, layer by layer.

Exact attention is computed a panel of rows at a time, so that memory beside the tokens is bounded.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd
from typing import Any, Protocol

import torch
from torch import Tensor

from nabla_attn.attention import attend
from nabla_attn.config import SparseConfig, parse
from nabla_attn.core.block_map import BlockMap
from nabla_attn.core.order import TokenLayout, block_order, text_entries, to_blocks
from nabla_attn.generation.generate import generate
from nabla_attn.generation.pipeline import model_identity
from nabla_attn.generation.request import GenerationRequest
from nabla_attn.methods import Moment
from nabla_attn.methods.calibration import TableMaker
from nabla_attn.methods.contract import TooManyTokensError
from nabla_attn.models import AttentionCall
from nabla_attn.record import describe_device
from nabla_attn.schedule import Schedule

DENSE = parse("dense")
EVERYTHING = "nabla-1"
LAYERS_PER_PROMPT = 2
KNOB_PROMPTS = 6
# Query tokens of which the kept probability is measured; all where there are fewer.
MASS_ROWS = 2048
# Probabilities held at once: 64 MB in fp32.
PANEL_VALUES = 2**24
# Latent frames are halved at most so often for a method that calibrates on short videos only.
MAX_HALVINGS = 6


@dataclass(frozen=True, eq=False)
class Call:
    """One attention call of a dense run: fp32 [1, heads, tokens, dim] in raster order.

    Attributes:
        q: Queries.
        k: Keys.
        v: Values.
        layout: Where the video's tokens and the text's are.
        moment: Step and layer.
        scale: Factor on q.k; None is 1/sqrt(dim).
        text_valid: False where text is padding; None is no padding.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    layout: TokenLayout
    moment: Moment
    scale: float | None = None
    text_valid: Tensor | None = None

    @property
    def factor(self) -> float:
        """The factor on q.k, as a number."""
        return self.q.shape[-1] ** -0.5 if self.scale is None else self.scale

    def laid_out(self, config: SparseConfig) -> TokenLayout:
        """The layout in the blocks of an algorithm."""
        return replace(self.layout, grid=self.layout.grid.with_block(config.block, config.order))

    def video(self, out: Tensor) -> Tensor:
        """The video's tokens of an output [1, heads, tokens, dim], as [heads, tokens * dim]."""
        start = self.layout.text_before
        return out[0, :, start : start + self.layout.grid.num_tokens].flatten(1)

    @cached_property
    def dense(self) -> Tensor:
        """Dense attention's output over the video's tokens, [heads, tokens * dim]."""
        options: dict[str, Any] = {"scale": self.scale, "text_valid": self.text_valid}
        with torch.no_grad():
            return self.video(attend(self.q, self.k, self.v, self.layout, DENSE, **options)[0])

    @cached_property
    def rows(self) -> Tensor:
        """The query tokens of which kept probability is measured, drawn once for every method."""
        drawn = torch.randperm(
            self.layout.grid.num_tokens, generator=torch.Generator().manual_seed(0)
        )
        return drawn[:MASS_ROWS].sort().values + self.layout.text_before

    def panels(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Head, query tokens, and their exact attention [tokens, tokens], panel by panel."""
        for head, (q, k) in enumerate(zip(self.q[0], self.k[0], strict=True)):
            for rows in self.rows.split(max(1, PANEL_VALUES // len(k))):
                scores = (q[rows] * self.factor) @ k.T
                if self._hidden is not None:
                    scores[:, self._hidden] = float("-inf")
                yield head, rows, scores.softmax(dim=-1)

    @cached_property
    def _hidden(self) -> Tensor | None:
        """Tokens that are padded text."""
        if self.text_valid is None:
            return None
        before = self.layout.text_before
        hidden = torch.zeros(self.layout.num_tokens, dtype=torch.bool)
        hidden[:before] = ~self.text_valid[0, :before]
        hidden[before + self.layout.grid.num_tokens :] = ~self.text_valid[0, before:]
        return hidden

    def block_mass(self, layout: TokenLayout) -> Tensor:
        """Probability of pairs of blocks, summed over the measured rows: [heads, blocks, blocks].

        Args:
            layout: This call's, in some blocks.
        """
        if layout not in self._masses:
            size, count = layout.grid.block.tokens, layout.num_blocks
            block = block_order(layout, self.q.device).to_raster // size
            square = torch.zeros(self.q.shape[1], count, count)
            for head, rows, probs in self.panels():
                sums = to_blocks(probs, layout, dim=1).unflatten(1, (count, size)).sum(dim=2)
                square[head].index_add_(0, block[rows], sums)
            self._masses[layout] = square
        return self._masses[layout]

    @cached_property
    def _masses(self) -> dict[TokenLayout, Tensor]:
        return {}

    def mass_of(self, block_map: BlockMap, layout: TokenLayout) -> Tensor:
        """Exact probability inside the kept blocks of every head, mean over the measured rows."""
        total = len(self.rows)
        if block_map.q_order is None or block_map.kv_order is None:
            return (self.block_mass(layout) * block_map.mask[0]).sum(dim=(1, 2)) / total
        heads, size = self.q.shape[1], block_map.block_tokens
        slots = block_map.q_order.slots[0].expand(heads, -1)
        tokens = block_map.kv_order.tokens[0].expand(heads, -1)
        column = torch.arange(tokens.shape[1]) // size
        sums = torch.zeros(heads)
        for head, rows, probs in self.panels():
            # A token may stand in several slots, of which a row sees one.
            kept = block_map.mask[0, head][slots[head][rows] // size][:, column]
            kept &= tokens[head] >= 0
            sums[head] += (probs[:, tokens[head].clamp_min(0)] * kept).sum()
        return sums / total


Series = list[Call]
"""The calls of one layer and guidance branch, in the order of steps."""

Tables = Mapping[str, Mapping[int, Any]]
"""The name of a method -> layer -> the entry that calibration made."""


class CallSource(Protocol):
    """Where the calls come from that methods are measured on."""

    @property
    def device(self) -> str:
        """The machine's name."""

    @property
    def seed(self) -> int:
        """The seed of everything random."""

    @property
    def head_names(self) -> Sequence[str]:
        """Names of the heads, where each has a kind of its own; or none."""

    @property
    def knob_prompts(self) -> int:
        """Prompts, from the first, on whose calls the knobs of methods are set."""

    def describe(self, number: int) -> dict[str, Any]:
        """The settings of a prompt's calls, as its record holds them."""

    def collect(self, number: int) -> list[Series]:
        """The calls of a prompt, by its number."""

    def make_tables(self, config: SparseConfig) -> Tables:
        """The table of an algorithm's method that needs one, from calls that are not measured."""


class Collector:
    """Keeps the calls of some layers and branches of a dense run.

    Args:
        number: The prompt's number, which decides which.
        num_steps: Denoising steps of the run.
    """

    def __init__(self, number: int, num_steps: int) -> None:
        self._number, self._num_steps = number, num_steps
        self._seen: dict[tuple[int | None, int], int] = {}
        self._found: dict[tuple[int, int], Series] = {}

    def attach(self, handle: Any) -> None:
        """Observe all layers of a handle."""
        self._num_layers = handle.num_layers
        self._pairs = pick_layers(self._number, self._num_layers)
        handle.observe(self._observe)

    def series(self) -> list[Series]:
        """The calls of each layer; where guidance goes in one batch there is one branch."""
        pairs = [pair if pair in self._found else (pair[0], 0) for pair in self._pairs]
        return [self._found[pair] for pair in dict.fromkeys(pairs)]

    def _observe(self, seen: AttentionCall) -> None:
        key = (seen.step, seen.layer)
        branch = self._seen[key] = self._seen.get(key, -1) + 1
        wanted = [mine for layer, mine in self._pairs if layer == seen.layer]
        # The first branch in any case: there may be no other.
        if branch in wanted or (wanted and branch == 0):
            call = call_of(seen, self._num_steps, self._num_layers)
            self._found.setdefault((seen.layer, branch), []).append(call)


def call_of(seen: AttentionCall, num_steps: int, num_layers: int) -> Call:
    """The last sample of an observed call, which under guidance is the one with the prompt.

    Raises:
        ValueError: The model brings its tokens in blocks.
    """
    if seen.is_block_order:
        raise ValueError(
            f"{seen.model} brings its tokens in blocks, which methods with other blocks cannot "
            "take. Measure methods on another model."
        )
    q, k, v = (x[-1:].float().cpu().clone() for x in (seen.q, seen.k, seen.v))
    moment = Moment(step=seen.step, num_steps=num_steps, layer=seen.layer, num_layers=num_layers)
    valid = None
    if seen.text_valid is not None:
        valid = text_entries(seen.text_valid[-1:], seen.layout).cpu()
    return Call(q, k, v, seen.layout, moment, seen.scale, valid)


class _LiveTable:
    """Makes a table from the calls of a video as it is made, so that none is kept."""

    def __init__(self, config: SparseConfig, num_steps: int) -> None:
        self._config, self._num_steps = config, num_steps
        self._maker = TableMaker(config.uses)

    def attach(self, handle: Any) -> None:
        """Observe all layers of a handle."""

        def show(seen: AttentionCall) -> None:
            add_call(self._maker, call_of(seen, self._num_steps, handle.num_layers), self._config)

        handle.observe(show)

    def tables(self) -> Tables:
        """The method's name -> layer -> its entry."""
        return {self._maker.use.name: self._maker.entries()}


def add_call(maker: TableMaker, call: Call, config: SparseConfig) -> None:
    """Show a call to what makes the table of an algorithm."""
    layout = call.laid_out(config)
    q, k, v = (to_blocks(x, layout) for x in (call.q, call.k, call.v))
    maker.add(q, k, v, layout, call.moment, call.factor)


def pick_layers(number: int, depth: int) -> list[tuple[int, int]]:
    """Layers and guidance branches of a prompt; other prompts take others in turn."""
    every = [(layer, branch) for layer in range(depth) for branch in (0, 1)]
    # A stride without a factor in common with the number of pairs, so that all come in turn.
    stride = next(step for step in range(5, 2 * depth + 6) if gcd(step, len(every)) == 1)
    first = number * LAYERS_PER_PROMPT
    return [every[(first + i) * stride % len(every)] for i in range(LAYERS_PER_PROMPT)]


class ModelCalls:
    """Calls of two layers and guidance branches of a dense video of each prompt.

    Args:
        pipeline: A text-to-video pipeline.
        request: The dense runs; prompt is replaced.
        prompts: What the videos show.
        table_prompt: What the video shows that calibrates methods with a table.
    """

    head_names: Sequence[str] = ()

    def __init__(
        self,
        pipeline: Any,
        request: GenerationRequest,
        prompts: Sequence[str],
        *,
        table_prompt: str = "",
    ) -> None:
        self._pipeline, self._request, self._prompts = pipeline, request, list(prompts)
        self._table_prompt = table_prompt
        self.device, self.seed = describe_device(pipeline.device), request.seed
        self._identity = model_identity(pipeline)

    @property
    def knob_prompts(self) -> int:
        """At most six, which show each layer and guidance branch of the built-in model once."""
        return min(len(self._prompts), KNOB_PROMPTS)

    def describe(self, number: int) -> dict[str, Any]:
        """The request with its prompt, and the model."""
        request = replace(self._request, prompt=self._prompts[number])
        return request.to_dict() | self._identity

    def collect(self, number: int) -> list[Series]:
        """Make the prompt's video with everything kept, and return its calls."""
        collector = Collector(number, self._request.steps)
        self._run(self._request.frames, self._prompts[number], collector)
        return collector.series()

    def make_tables(self, config: SparseConfig) -> Tables:
        """Calibrate on one dense video, a shorter one where the method asks for it."""
        frames = self._request.frames
        for _ in range(MAX_HALVINGS):
            live = _LiveTable(config, self._request.steps)
            try:
                self._run(frames, self._table_prompt, live)
                return live.tables()
            except TooManyTokensError:
                if frames == 1:
                    raise
            # Frames of a video are one more than a multiple of four.
            frames = (frames - 1) // 8 * 4 + 1
        raise ValueError(f"{config} cannot be calibrated on a video of {frames} frames.")

    def _run(self, frames: int, prompt: str, observer: Collector | _LiveTable) -> None:
        everything = Schedule(algorithm=parse(EVERYTHING))
        run = replace(
            self._request,
            prompt=prompt,
            frames=frames,
            sparse_algo=EVERYTHING,
            schedule=everything,
        )
        generate(self._pipeline, run, on_apply=observer.attach)
