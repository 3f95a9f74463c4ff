"""Calls of a model's dense videos, layer by layer, for measuring methods on them."""

from collections.abc import Sequence
from dataclasses import replace
from math import gcd
from typing import Any

from nabla_attn.config import SparseConfig, parse
from nabla_attn.core.order import text_entries
from nabla_attn.evaluation.calls import Call, Series, Tables, add_call
from nabla_attn.generation.generate import generate
from nabla_attn.generation.pipeline import model_identity
from nabla_attn.generation.request import GenerationRequest
from nabla_attn.methods import Moment
from nabla_attn.methods.calibration import TableMaker
from nabla_attn.methods.contract import TooManyTokensError
from nabla_attn.models import AttentionCall
from nabla_attn.record import describe_device
from nabla_attn.schedule import Schedule

EVERYTHING = "nabla-1"
LAYERS_PER_PROMPT = 2
KNOB_PROMPTS = 6
# Latent frames are halved at most so often for a method that calibrates on short videos only.
MAX_HALVINGS = 6


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
