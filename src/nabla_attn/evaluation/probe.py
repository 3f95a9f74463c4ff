"""Where a method loses: measures of every step, layer and head while a video is made."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nabla_attn.core.losses import measure_losses, pooled_mass
from nabla_attn.files import whole_file
from nabla_attn.models import AttentionCall

MEASURES = ("density", "kept_mass", "true_mass", "best_mass", "output_error")
LOSSLESS = dict.fromkeys(MEASURES, 1.0) | {"output_error": 0.0}


@dataclass(frozen=True)
class ProbeResult:
    """Every measure as fp32 [steps, layers, heads], averaged over the calls of a step.

    Dense layers count as losing nothing.

    Attributes:
        values: One tensor for each of `MEASURES`.
    """

    values: dict[str, Tensor]

    def to_dict(self) -> dict[str, Any]:
        """Plain values: means, and means over heads per step and layer."""
        result: dict[str, Any] = {}
        for name, values in self.values.items():
            result[name] = round(values.mean().item(), 6)
            per_layer = values.mean(dim=-1)
            result[f"{name}_per_step_and_layer"] = [
                [round(value, 5) for value in row] for row in per_layer.tolist()
            ]
        return result

    def save(self, path: str | Path) -> None:
        """Write all steps, layers and heads as safetensors."""
        from safetensors.torch import save_file

        with whole_file(path) as temporary:
            save_file(self.values, temporary)


class AttentionProbe:
    """Measures every sparse call; give `attach` to `generate(on_apply=...)`.

    It makes a run slower, so its seconds must not be reported.

    Args:
        num_steps: Denoising steps of the run.
        num_rows: Query tokens sampled per call.
    """

    def __init__(self, num_steps: int, *, num_rows: int = 16) -> None:
        self._num_steps = num_steps
        self._num_rows = num_rows
        self._sums: Tensor | None = None

    def attach(self, handle: Any) -> None:
        """Observe all layers of a handle."""
        layers, heads = handle.num_layers, handle.num_heads
        self._sums = torch.zeros(len(MEASURES), self._num_steps, layers, heads)
        self._calls = torch.zeros(self._num_steps, layers, heads)
        handle.observe(self._observe)

    def result(self) -> ProbeResult:
        """The measures; what did not run sparse counts as dense."""
        assert self._sums is not None
        values = {}
        for name, sums in zip(MEASURES, self._sums, strict=True):
            means = torch.where(self._calls > 0, sums / self._calls.clamp_min(1), LOSSLESS[name])
            values[name] = means.contiguous()
        return ProbeResult(values)

    def _observe(self, seen: AttentionCall) -> None:
        step, index = seen.step, seen.layer
        assert self._sums is not None and step is not None
        call = seen.last_sample()
        losses = measure_losses(call, num_rows=self._num_rows, seed=step * 1000 + index)
        parts = (
            call.block_map.head_density[0].cpu(),
            pooled_mass(call).cpu(),
            losses.true_mass,
            losses.best_mass,
            losses.output_error,
        )
        heads = seen.head_index
        self._sums[:, step, index, heads] += torch.stack([part.float() for part in parts])
        self._calls[step, index, heads] += 1
