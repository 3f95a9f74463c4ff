"""The algorithms that heads may use, and what each keeps and loses in each step, layer and head."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nabla_attn.config import DENSE, SparseConfig, parse
from nabla_attn.core.block_map import BlockMap
from nabla_attn.core.losses import measure_losses
from nabla_attn.files import whole_file
from nabla_attn.models import AttentionCall

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7)
DEFAULT = ("nabla-*", "topk-*", "nabla-*_sta-3-3-3")


def read_candidates(texts: Iterable[str]) -> list[SparseConfig]:
    """Algorithms of strings in which a `*` stands for `THRESHOLDS` or `SHARES`; dense goes last.

    Raises:
        ValueError: A string is no algorithm, or none is given.
    """
    configs: list[SparseConfig] = []
    for text in texts:
        numbers = SHARES if "topk" in text else THRESHOLDS
        filled = [text.replace("*", str(number)) for number in numbers] if "*" in text else [text]
        configs += map(parse, filled)
    configs = list(dict.fromkeys(config for config in configs if not config.is_dense))
    if not configs:
        raise ValueError("there is nothing to choose from: pass an algorithm such as nabla-*.")
    return [*configs, DENSE]


@dataclass(frozen=True)
class CandidateLosses:
    """Means over calls, float64 [steps, layers, heads, candidates].

    Where a rule of the schedule keeps a layer dense in a step, all candidates count as dense.

    Attributes:
        density: Scores computed over all pairs of tokens: kept pairs, and summaries of a tail.
        error: Distance of the sparse from the exact output over the length of the latter.
        noise: Squared distance of the head's output over the squared length of the layer's: what
            the head's error is in what the layer gives on.
    """

    density: np.ndarray
    error: np.ndarray
    noise: np.ndarray

    def save(self, path: Path) -> None:
        """Write the losses as fp32 safetensors, whole or not at all."""
        from safetensors.numpy import save_file

        with whole_file(path) as temporary:
            save_file(
                {name: x.astype(np.float32) for name, x in asdict(self).items()}, str(temporary)
            )

    @classmethod
    def load(cls, path: Path) -> "CandidateLosses":
        """Read what `save` wrote.

        Raises:
            ValueError: The file is missing or holds something else.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            found = load_file(str(path))
            return cls(**{name: x.astype(np.float64) for name, x in found.items()})
        except (OSError, SafetensorError, TypeError) as error:
            raise ValueError(f"{path} holds no losses of candidates ({error}).") from None


def mean_losses(losses: Sequence[CandidateLosses]) -> CandidateLosses:
    """The means of several prompts' losses."""
    names = ("density", "error", "noise")
    return CandidateLosses(
        *(np.mean([getattr(each, name) for each in losses], axis=0) for name in names)
    )


@dataclass(frozen=True)
class SeenCalls:
    """What the attention calls of a run were, as far as their seconds depend on it.

    Attributes:
        calls: Calls of a layer over the whole run.
        batch: Samples of a call.
        heads: Heads of a layer.
        dim: Dimension of a head.
        text: Text tokens in front of and behind the video.
        tokens: Video tokens along (frames, height, width).
        dtype: Type of the queries.
    """

    calls: int
    batch: int
    heads: int
    dim: int
    text: tuple[int, int]
    tokens: tuple[int, int, int]
    dtype: str


class CandidateProbe:
    """Measures candidates on the queries and keys of sparse calls.

    Give `attach` to `generate(on_apply=...)` with an algorithm that keeps every block: the run
    itself then loses nothing, and no candidate is measured on what another one changed.

    Args:
        candidates: Algorithms; dense is known and not measured.
        num_steps: Denoising steps of the run.
        num_rows: Query tokens sampled per call.
    """

    def __init__(
        self, candidates: Sequence[SparseConfig], num_steps: int, *, num_rows: int = 16
    ) -> None:
        self._candidates = candidates
        self._num_steps = num_steps
        self._num_rows = num_rows
        self._seen: AttentionCall | None = None

    def attach(self, handle: Any) -> None:
        """Observe all layers of a handle."""
        shape = (self._num_steps, handle.num_layers, handle.num_heads)
        self._sums = np.zeros((3, *shape, len(self._candidates)))
        self._calls = np.zeros((*shape, 1))
        handle.observe(self._observe)

    def losses(self) -> CandidateLosses:
        """The means of the run."""
        means = self._sums / self._calls.clip(min=1)
        for mean, dense in zip(means, (1.0, 0.0, 0.0), strict=True):
            mean[self._calls[..., 0] == 0] = dense
        return CandidateLosses(*means)

    def seen(self) -> SeenCalls:
        """What the calls were.

        Raises:
            ValueError: The schedule kept everything dense.
        """
        if self._seen is None:
            raise ValueError("nothing was sparse: the schedule keeps every step and layer dense.")
        batch, heads, _, dim = self._seen.q.shape
        layout = self._seen.layout
        return SeenCalls(
            calls=int(self._calls.sum(axis=0).max()),
            batch=batch,
            heads=heads,
            dim=dim,
            text=(layout.text_before, layout.text_after),
            tokens=(layout.grid.frames, layout.grid.height, layout.grid.width),
            dtype=str(self._seen.q.dtype).removeprefix("torch."),
        )

    def _observe(self, seen: AttentionCall) -> None:
        step, index, heads = seen.step, seen.layer, seen.q.shape[1]
        assert step is not None
        self._seen = seen
        place = (slice(None), step, index, slice(heads))
        for number, config in enumerate(self._candidates):
            found = np.stack([np.ones(heads), np.zeros(heads), np.zeros(heads)])
            if not config.is_dense:
                call = seen.last_sample(config)
                # The same tokens for all candidates, so that they differ in nothing else.
                lost = measure_losses(call, num_rows=self._num_rows, seed=step * 1000 + index)
                length = lost.squared_length.sum().clamp(min=torch.finfo(torch.float32).tiny)
                density = call.block_map.head_density[0].cpu()
                if config.tail is not None:
                    density = density + _summaries(call.block_map, call.layout.grid.num_blocks)
                noise = lost.squared_distance / length
                found = torch.stack([density, lost.output_error, noise]).double().numpy()
            self._sums[(*place, number)] += found
        self._calls[step, index, :heads] += 1


def _summaries(block_map: BlockMap, num_blocks: int) -> Tensor:
    """Scores of the summaries of dropped blocks / all token pairs, fp32 [heads]."""
    dropped = (~block_map.mask[0, :, :, :num_blocks]).sum(dim=-1)
    pairs = block_map.q_counts.sum() * block_map.kv_counts[0].sum()
    return ((dropped * block_map.q_counts).sum(dim=-1) / pairs).float().cpu()
