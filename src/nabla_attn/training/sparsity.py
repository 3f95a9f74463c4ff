"""Sparse attention of the trained module, step by step: thresholds, ramp, dense share, layers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from nabla_attn.config import DENSE, SparseConfig, parse
from nabla_attn.generation.schedules import load_schedule
from nabla_attn.methods import MethodUse, find, make_use
from nabla_attn.models import Handle, add_method_parts, apply, load_method_parts
from nabla_attn.schedule import Schedule
from nabla_attn.training.noise import GOLDEN
from nabla_attn.training.sections import SparsityConfig


class Sparsity:
    """NABLA on a module, with the algorithm of the current step.

    Args:
        module: The transformer, not wrapped.
        config: The attention to train.
        parts: File of trained parts that came with the weights; only methods that are trained use
            it.

    Attributes:
        asked: The schedule with all its rules, as generation follows it.
        schedule: The rules of it that training follows.

    Raises:
        ValueError: The module cannot be made sparse, or the schedule file is not one.
    """

    def __init__(
        self, module: nn.Module, config: SparsityConfig, parts: Path | None = None
    ) -> None:
        self.config = config
        self.asked = read_schedule(config)
        # Rules about denoising steps do not apply to training.
        rules = replace(self.asked.without_steps(), reuse_steps=1, reuse_guidance=False)
        own = tuple(replace(rule, reuse_steps=None) for rule in rules.rules)
        self.schedule = replace(rules, rules=own)
        self._handle: Handle | None = None
        # To stay when it is taken out again: they belong to the weights.
        if parts is not None and has_parts(self.schedule):
            load_method_parts(module, parts)
        add_method_parts(module, self.schedule.method_names)
        if not all(config.is_dense for config in self.schedule.algorithms):
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
        algorithm = self.schedule.algorithm.with_use(make_use("nabla", threshold))
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
        schedule = load_schedule(config.schedule)
    except ValueError as error:
        raise ValueError(f"sparsity.{error}") from None
    return replace(schedule, allow_mismatch=config.allow_mismatch or schedule.allow_mismatch)


def has_parts(schedule: Schedule) -> bool:
    """Whether one of its methods has parts that are trained."""
    return any(find(name).parts is not None for name in schedule.method_names)


def may_idle(config: SparsityConfig) -> bool:
    """Whether some steps or layers may leave trained parts without gradients."""
    differs = config.schedule is not None or config.dense_share > 0
    return differs and has_parts(read_schedule(config))


def ramped(schedule: Schedule, progress: float) -> Schedule:
    """A schedule on its way from everything kept (progress 0) to itself (1)."""
    if progress >= 1:
        return schedule
    return schedule.map_algorithms(partial(_ramped, progress=progress))


def _ramped(config: SparseConfig, progress: float) -> SparseConfig:
    """An algorithm whose kept shares are between 1 and their own."""
    for use in config.uses:
        parameters = find(use.name).parameters
        values = [
            1 - (1 - value) * progress if parameter.is_share else value
            for parameter, value in zip(parameters, use.values, strict=True)
        ]
        config = config.with_use(MethodUse(use.name, tuple(values)))
    return config
