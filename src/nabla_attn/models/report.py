"""What attention did: density and kept mass per step, layer and head."""

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nabla_attn.models.context_parallel import balanced_order, imbalance

# Forwards remembered of one step; training, which has no steps, must not fill memory.
MAX_FORWARDS = 1024


@dataclass(frozen=True)
class Forward:
    """One forward of a transformer: the statistics that its layers write.

    Attributes:
        model: The transformer's name in the pipeline.
        step: Denoising step; None with gradients.
        tokens: Video tokens along (frames, height, width).
        stats: Per layer fp32 [3, heads] for density, kept mass and the tail's density; NaN where a
            layer did not run, None where it is dense.
    """

    model: str
    step: int | None
    tokens: tuple[int, int, int]
    stats: list[Tensor | None]


@dataclass(frozen=True)
class Report:
    """Statistics of the last generation, averaged over the calls of a step.

    Dense layers count as density 1 and kept mass 1; NaN is a layer that did not run in that step
    (a cache skipped it). Where a map from an earlier call served, its kept mass is NaN: not known.

    Attributes:
        density: Kept token pairs / all token pairs, fp32 [steps, layers, heads].
        kept_mass: Kept probability mass of the pooled map, fp32 [steps, layers, heads].
        tail_density: Scores of the summaries that stand for dropped blocks / all token pairs, fp32
            [steps, layers, heads]; 0 without a tail. Density does not count them.
        models: The transformer that ran each step.
    """

    density: Tensor
    kept_mass: Tensor
    tail_density: Tensor
    models: list[str]

    @property
    def mean_density(self) -> float:
        """Mean density over steps, layers and heads; NaN when nothing ran."""
        return self.density.nanmean().item()

    @property
    def mean_kept_mass(self) -> float:
        """Mean kept mass over steps, layers and heads; NaN when nothing ran."""
        return self.kept_mass.nanmean().item()

    def head_balance(self, num_ranks: int) -> tuple[float, float]:
        """Work of the busiest rank / mean work when ranks share the heads: (as they are, balanced).

        Mean over layers and steps; balanced means by the densities of the step before, as context
        parallelism does. NaN when no step has one before it.
        """
        before, after = [], []
        for step in range(1, self.density.shape[0]):
            for last, now in zip(self.density[step - 1], self.density[step], strict=True):
                if last.isnan().any() or now.isnan().any():
                    continue
                order = balanced_order(last.tolist(), num_ranks)
                before.append(imbalance(now.tolist(), num_ranks))
                after.append(imbalance(now.tolist(), num_ranks, order))
        return _mean(before), _mean(after)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for records: means, and density and kept mass per step and layer."""
        return {
            "density": _plain(self.density.nanmean()),
            "kept_mass": _plain(self.kept_mass.nanmean()),
            "tail_density": _plain(self.tail_density.nanmean()),
            "density_per_step_and_layer": _plain(self.density.nanmean(dim=-1)),
            "kept_mass_per_step_and_layer": _plain(self.kept_mass.nanmean(dim=-1)),
            "models": self.models,
        }

    def __str__(self) -> str:
        steps, layers, heads = self.density.shape
        tail = self.tail_density.nanmean().item()
        extra = f" + {tail:.4f} of summaries" if tail > 0 else ""
        return (
            f"density {self.mean_density:.3f}{extra}, kept mass {self.mean_kept_mass:.3f} over "
            f"{steps} steps, {layers} layers, {heads} heads"
        )

    def __repr__(self) -> str:
        return f"Report({self})"

    def _repr_html_(self) -> str:
        """A table of the layers, their steps and heads averaged, as notebooks show it."""
        columns = (self.density.nanmean(dim=(0, 2)), self.kept_mass.nanmean(dim=(0, 2)))
        cells = zip(*(column.tolist() for column in columns), strict=True)
        rows = "".join(
            f"<tr><td>{layer}</td><td>{density:.3f}</td><td>{mass:.3f}</td></tr>"
            for layer, (density, mass) in enumerate(cells)
        )
        head = "<tr><th>layer</th><th>density</th><th>kept mass</th></tr>"
        return f"<p>{self}</p><table><thead>{head}</thead><tbody>{rows}</tbody></table>"


class Telemetry:
    """Collects the forwards of the running generation; shared by the transformers of a pipeline."""

    def __init__(self) -> None:
        self._steps: dict[int | None, deque[Forward]] = {}
        self._generation: int | None = None

    def record(self, forward: Forward, generation: int) -> None:
        """Remember a forward; those of an earlier generation are dropped."""
        if generation != self._generation:
            self._steps.clear()
            self._generation = generation
        self._steps.setdefault(forward.step, deque(maxlen=MAX_FORWARDS)).append(forward)

    @property
    def forwards(self) -> list[Forward]:
        """The forwards of the running generation, oldest first."""
        return [forward for calls in self._steps.values() for forward in calls]

    def last_densities(self) -> list[float]:
        """Mean density of every layer in the last forward, 1 where it was dense."""
        forwards = self.forwards
        stats = forwards[-1].stats if forwards else []
        return [1.0 if layer is None else float(layer[0].detach().nanmean()) for layer in stats]

    def report(self) -> Report:
        """Read the statistics; waits for the device."""
        forwards = self.forwards
        num_layers = max((len(f.stats) for f in forwards), default=0)
        tensors = [stats for f in forwards for stats in f.stats if stats is not None]
        num_heads = max((stats.shape[1] for stats in tensors), default=1)
        values = torch.full((len(self._steps), num_layers, 3, num_heads), float("nan"))
        for row, calls in enumerate(self._steps.values()):
            stacked = [_stack(call, num_layers, num_heads) for call in calls]
            values[row] = torch.stack(stacked).nanmean(dim=0)
        models = [calls[-1].model for calls in self._steps.values()]
        density, kept_mass, tail_density = (x.clone() for x in values.unbind(dim=2))
        return Report(density, kept_mass, tail_density, models)


def _stack(forward: Forward, num_layers: int, num_heads: int) -> Tensor:
    values = torch.full((num_layers, 3, num_heads), float("nan"))
    for layer, stats in enumerate(forward.stats):
        if stats is None:
            values[layer, :2], values[layer, 2] = 1, 0
        else:
            values[layer, :, : stats.shape[1]] = stats.cpu()
    return values


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _plain(values: Tensor) -> Any:
    """Nested lists of rounded numbers, None for NaN."""
    if values.ndim:
        return [_plain(value) for value in values]
    number = values.item()
    return None if number != number else round(number, 6)
