"""Recording of block maps while a video is made."""

import itertools
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from nabla_attn.core.grid import BlockShape, TokenGrid
from nabla_attn.core.losses import measure_losses, pooled_scores
from nabla_attn.generation.map_file import SCORE_BITS, RecordedMaps, choose_recorded
from nabla_attn.generation.request import GenerationRequest, video_tokens
from nabla_attn.models import AttentionCall
from nabla_attn.record import RunRecord
from nabla_attn.schedule import Schedule


class MapRecorder:
    """Records the first call of each step and layer: the one with the prompt.

    Give `attach` to `generate(on_apply=...)`, then take `result`. The run's seconds in the
    transformer include those of the recording, which are counted in `seconds`.

    Args:
        pipeline: The pipeline of the run.
        request: The request of the run.
        num_rows: Query tokens sampled per step and layer for the losses.
        asked: Steps, layers, heads, has_scores and max_bytes of
            `nabla_attn.generation.map_file.choose_recorded`.
    """

    def __init__(
        self, pipeline: Any, request: GenerationRequest, *, num_rows: int = 16, **asked: Any
    ) -> None:
        self._algorithm = request.sparse_algo
        self._num_steps = request.steps
        self._grid = TokenGrid(*video_tokens(pipeline, request), block=_block_of(request))
        self._num_rows = num_rows
        self._asked = asked
        self._maps: dict[tuple[int, int, int], tuple[np.ndarray, np.ndarray | None]] = {}
        self._seen: set[tuple[int, int, tuple[int, ...] | None]] = set()
        self.seconds = 0.0

    def attach(self, handle: Any) -> None:
        """Choose what fits and observe the layers of a handle.

        Raises:
            ValueError: What was asked for does not exist or is too large.
        """
        counts = (self._num_steps, handle.num_layers, handle.num_heads)
        self._selection = choose_recorded(counts, self._grid.num_blocks, **self._asked)
        names = ("density", "true_mass", "best_mass")
        self._numbers = {name: torch.ones(counts) for name in names}
        handle.observe(self._observe)

    def result(self) -> RecordedMaps:
        """What was recorded.

        Raises:
            ValueError: No sparse attention ran.
        """
        if not self._seen:
            raise ValueError(
                "there are no maps to record: attention was dense throughout. Ask for a sparse "
                "algorithm, and for more steps than its dense ones."
            )
        chosen, count = self._selection, self._grid.num_blocks
        shape = (len(chosen.steps), len(chosen.layers), len(chosen.heads), count)
        masks = np.full((*shape, -(-count // 8)), 255, np.uint8)  # dense unless recorded
        scores = np.zeros((*shape, count) if chosen.has_scores else 0, np.uint8)
        counts = [range(size) for size in masks.shape[:3]]
        for place in itertools.product(*counts):
            row, column, index = place
            named = (chosen.steps[row], chosen.layers[column], chosen.heads[index])
            packed, quantised = self._maps.get(named, (None, None))
            if packed is not None:
                masks[place] = packed
            if quantised is not None:
                scores[place] = quantised
        grid, block = self._grid, self._grid.block
        return RecordedMaps(
            algorithm=self._algorithm,
            blocks=grid.blocks,
            block=(block.frames, block.height, block.width),
            grid=(grid.frames, grid.height, grid.width),
            selection=chosen,
            masks=torch.from_numpy(masks),
            scores=torch.from_numpy(scores),
            **self._numbers,
        )

    def note_in(self, record: RunRecord) -> RunRecord:
        """The run's record with the seconds of the recording, which its others include."""
        seconds = record.numbers["seconds"] | {"recording": round(self.seconds, 4)}
        return replace(record, numbers=record.numbers | {"seconds": seconds})

    def _observe(self, call: AttentionCall) -> None:
        if call.step is None:
            return
        place = (call.step, call.layer, call.heads)
        if place not in self._seen:
            self._seen.add(place)
            began = time.perf_counter()
            self._record(call.step, call.layer, call)
            self.seconds += time.perf_counter() - began

    def _record(self, step: int, layer: int, seen: AttentionCall) -> None:
        call = seen.last_sample()
        losses = measure_losses(call, num_rows=self._num_rows, seed=step * 1000 + layer)
        index = seen.head_index
        self._numbers["density"][step, layer, index] = call.block_map.head_density[0].cpu()
        self._numbers["true_mass"][step, layer, index] = losses.true_mass
        self._numbers["best_mass"][step, layer, index] = losses.best_mass
        chosen = self._selection
        if step not in chosen.steps or layer not in chosen.layers:
            return
        count = self._grid.num_blocks
        mask = call.block_map.mask[0, :, :count, :count].cpu().numpy()
        scores = to_bytes(pooled_scores(call).cpu()) if chosen.has_scores else None
        for place, head in enumerate(seen.heads or range(len(mask))):
            if head in chosen.heads:
                packed = np.packbits(mask[place], axis=-1)
                self._maps[step, layer, head] = (packed, None if scores is None else scores[place])


def _block_of(request: GenerationRequest) -> BlockShape:
    """The blocks of a request's algorithms.

    Raises:
        ValueError: They differ from layer to layer or step to step.
    """
    schedule = request.schedule or Schedule.default(request.sparse_algo)
    sparse = [config for config in schedule.algorithms if not config.is_dense]
    if any(config.order is not None for config in sparse):
        raise ValueError(
            f"recorded maps show blocks where they lie in the video: got {schedule}. Record one "
            "without an order of tokens."
        )
    shapes = {BlockShape(*(config.block or ())) for config in sparse}
    if len(shapes) > 1:
        raise ValueError(
            f"maps of one run are recorded in one block shape: got {schedule}. Record runs of one "
            "shape each."
        )
    return shapes.pop() if shapes else BlockShape()


def to_bytes(scores: torch.Tensor) -> np.ndarray:
    """Probabilities to bytes, logarithmic, within 3.4 %."""
    logs = scores.double().clamp_min(2.0**-SCORE_BITS).log2()
    return ((logs / SCORE_BITS + 1) * 255).round().to(torch.uint8).numpy()
