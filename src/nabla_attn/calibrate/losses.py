"""What each candidate would keep and lose in every layer of a run that keeps everything."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nabla_attn.config import SparseConfig
from nabla_attn.core.losses import measure_losses
from nabla_attn.models import AttentionCall


@dataclass(frozen=True)
class CandidateLosses:
    """Means over steps, calls and heads, float64 [layers, candidates].

    Where a rule of the schedule keeps a layer dense in a step, all candidates count as dense.

    Attributes:
        density: kept token pairs over all.
        error: distance of the sparse from the exact output over the length of the latter.
    """

    density: np.ndarray
    error: np.ndarray


class CandidateProbe:
    """Measures candidates on the queries and keys of sparse calls.

    Give `attach` to ``generate(on_apply=...)`` with an algorithm that keeps every block: the run
    itself then loses nothing, and no candidate is measured on what another one changed.

    Args:
        candidates: algorithms; dense is known and not measured.
        num_steps: denoising steps of the run.
        num_rows: query tokens sampled per call.
    """

    def __init__(
        self, candidates: Sequence[SparseConfig], num_steps: int, *, num_rows: int = 16
    ) -> None:
        self._candidates = candidates
        self._num_steps = num_steps
        self._num_rows = num_rows

    def attach(self, handle: Any) -> None:
        """Observe all layers of a handle."""
        layers = handle.num_layers
        self._sums = np.zeros((2, self._num_steps, layers, len(self._candidates)))
        self._calls = np.zeros((self._num_steps, layers, 1))
        handle.observe(self._observe)

    def losses(self) -> CandidateLosses:
        """The means of the run."""
        means = self._sums / self._calls.clip(min=1)
        for mean, dense in zip(means, (1.0, 0.0), strict=True):
            mean[self._calls[..., 0] == 0] = dense
        return CandidateLosses(*means.mean(axis=1))

    def _observe(self, seen: AttentionCall) -> None:
        step, index = seen.step, seen.layer
        assert step is not None
        for number, config in enumerate(self._candidates):
            density, error = 1.0, 0.0
            if not config.is_dense:
                call = seen.last_sample(config)
                # The same tokens for all candidates, so that they differ in nothing else.
                lost = measure_losses(call, num_rows=self._num_rows, seed=step * 1000 + index)
                density, error = call.block_map.density, lost.output_error.mean().item()
            self._sums[:, step, index, number] += density, error
        self._calls[step, index] += 1
