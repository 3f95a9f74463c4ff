"""Sparse attention of the trained module, step by step: thresholds, ramp, dense share, layers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import nn

from nabla_attn.config import DENSE, SparseConfig, parse
from nabla_attn.models import Handle, apply
from nabla_attn.schedule import Schedule
from nabla_attn.training.noise import GOLDEN
from nabla_attn.training.sections import SparsityConfig


class Sparsity:
    """NABLA on a module, with the algorithm of the current step.

    Args:
        module: The transformer, not wrapped.
        config: The attention to train.

    Attributes:
        asked: The schedule with all its rules, as generation follows it.
        schedule: The rules of it that training follows.

    Raises:
        ValueError: The module cannot be made sparse, or the schedule file is not one.
    """

    def __init__(self, module: nn.Module, config: SparsityConfig) -> None:
        self.config = config
        self.asked = read_schedule(config)
        # Rules about denoising steps do not apply to training.
        self.schedule = replace(
            self.asked,
            dense_first_steps=0,
            dense_last_steps=0,
            step_overrides={},
            reuse_steps=1,
            reuse_guidance=False,
        )
        self._handle: Handle | None = None
        is_dense = self.schedule.algorithm.is_dense and not self.schedule.layer_overrides
        if not is_dense:
            self._handle = apply(module, schedule=self.schedule, backend=config.backend)

    @property
    def layers(self) -> list[str]:
        """Paths of the attention modules, in order."""
        return [] if self._handle is None else [layer.path for layer in self._handle.layers]

    def set_step(self, step: int) -> None:
        """Attention of an optimiser step, counted from 0."""
        share = self.config.dense_share
        if int((step + 1) * share) > int(step * share):
            self._use(Schedule(algorithm=DENSE))
        else:
            progress = min(1.0, (step + 1) / self.config.ramp) if self.config.ramp else 1.0
            self._use(ramped(self._drawn(step), progress))

    def set_target(self) -> None:
        """The attention that is trained for, as validation measures it."""
        self._use(self.schedule)

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Switch to dense attention during the block."""
        if self._handle is None:
            yield
            return
        before = self._handle.schedule
        self._use(Schedule(algorithm=DENSE))
        try:
            yield
        finally:
            self._use(before)

    def densities(self) -> list[float]:
        """Kept share of the token pairs of every layer in the last forward; waits for the device.

        A dense layer is 1. Empty without sparse attention or before the first forward.
        """
        return [] if self._handle is None else self._handle.last_densities()

    def _drawn(self, step: int) -> Schedule:
        if self.config.thresholds is None:
            return self.schedule
        lowest, highest = self.config.thresholds
        # Follows from the step alone, so that a resumed run repeats it.
        threshold = lowest + (highest - lowest) * (step * GOLDEN % 1)
        algorithm = replace(self.schedule.algorithm, threshold=threshold)
        return replace(self.schedule, algorithm=algorithm)

    def _use(self, schedule: Schedule) -> None:
        if self._handle is not None:
            self._handle.set_schedule(schedule)


def read_schedule(config: SparsityConfig) -> Schedule:
    """The schedule of a configuration.

    Raises:
        ValueError: The schedule file cannot be read.
    """
    if config.schedule is None:
        return Schedule(algorithm=parse(config.algorithm))
    try:
        return Schedule.from_json(Path(config.schedule).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"sparsity.schedule {config.schedule}: {reason}") from None


def ramped(schedule: Schedule, progress: float) -> Schedule:
    """A schedule on its way from everything kept (progress 0) to itself (1)."""
    if progress >= 1:
        return schedule
    overrides = {
        layer: _ramped(config, progress) for layer, config in schedule.layer_overrides.items()
    }
    return replace(
        schedule, algorithm=_ramped(schedule.algorithm, progress), layer_overrides=overrides
    )


def _ramped(config: SparseConfig, progress: float) -> SparseConfig:
    def share(target: float | None) -> float | None:
        return None if target is None else 1 - (1 - target) * progress

    return replace(config, threshold=share(config.threshold), topk=share(config.topk))
