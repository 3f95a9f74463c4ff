"""The planner of one model: which grid, step and algorithm each layer has in a forward."""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import ref

import torch
from torch import nn

from nabla_attn import methods
from nabla_attn.calibrated_for import package_version
from nabla_attn.config import DENSE
from nabla_attn.core.grid import TokenGrid
from nabla_attn.head_rules import HeadGroup
from nabla_attn.machine import min_tokens_here
from nabla_attn.methods import Moment
from nabla_attn.models.context_parallel import (
    Ranks,
    balanced_order,
    keep_ranks_from,
    ranks_of,
    shares_arguments,
)
from nabla_attn.models.map_cache import MapReuse
from nabla_attn.models.method_parts import parts_of
from nabla_attn.models.modules import attention_modules, num_heads
from nabla_attn.models.plan import Layer, Plan, plan_key
from nabla_attn.models.report import Forward, Telemetry
from nabla_attn.models.row import ModelRow, packed_clips
from nabla_attn.models.steps import StepCounter
from nabla_attn.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class ApplySettings:
    """What the user asked of `apply`, the same for all transformers of a pipeline."""

    schedule: Schedule
    has_auto_min_tokens: bool = False
    backend: str = "auto"
    telemetry: bool = True


class Planner:
    """Decides before each forward of a model what its layers do in it.

    Args:
        name: The model's name in its pipeline, for reports.
        model: The model.
        row: Its row in the table.
        settings: What the user asked for.
        steps: The step counter, shared by the transformers of a pipeline.
        telemetry: The collector of statistics, shared like `steps`.

    Raises:
        ValueError: The model has no such attention, or the schedule names a layer it lacks.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        row: ModelRow,
        settings: ApplySettings,
        steps: StepCounter,
        telemetry: Telemetry,
    ) -> None:
        self.name = name
        self.row = row
        self.steps = steps
        self.telemetry = telemetry
        self.class_name = type(model).__name__.removeprefix("FSDP")
        self.modules = attention_modules(model, row)
        self.layers = [
            Layer(path, model=name, index=index, num_heads=num_heads(module))
            for index, (path, module) in enumerate(self.modules.items())
        ]
        self.use(settings)

    @property
    def pairs(self) -> Iterator[tuple[Layer, Any]]:
        """Every layer with its attention module."""
        return zip(self.layers, self.modules.values(), strict=True)

    def use(self, settings: ApplySettings) -> None:
        """Follow other settings from the next forward on; maps that are kept are dropped.

        Raises:
            ValueError: The schedule names a layer that the model does not have, or a method has no
                table or one of another model.
        """
        self.check(settings.schedule)
        self.settings = settings
        self._matched: Any = None
        self.reuse = MapReuse(settings.schedule)
        for layer in self.layers:
            layer.maps.forget()
            tables = settings.schedule.tables.items()
            layer.tables = {name: entries[layer.index] for name, entries in tables}

    def _check_tables(self, schedule: Schedule) -> None:
        """Raise ValueError where a method has no table, or one of another model."""
        for name, entries in schedule.tables.items():
            if len(entries) != len(self.layers):
                raise ValueError(
                    f"the table of {name} must have an entry for each of {len(self.layers)} "
                    f"layers: got {len(entries)}. It was made for another model."
                )
        for name in sorted(schedule.method_names):
            if "table" in methods.find(name).needs and name not in schedule.tables:
                raise ValueError(methods.why_no_table(name))

    def check(self, schedule: Schedule) -> None:
        """Refuse a schedule for another model, or that names what this one does not have.

        Raises:
            ValueError: It does.
        """
        layers, heads = len(self.layers), max(layer.num_heads for layer in self.layers)
        schedule.check_match(
            model=self.class_name, layers=layers, heads=heads, version=package_version()
        )
        schedule.check_layers(layers, num_heads=heads)
        self._check_tables(schedule)

    def plan(self, model: nn.Module, arguments: Mapping[str, Any]) -> None:
        """Decide for every layer what it does in this forward, in this thread."""
        step = self._step(model, arguments.get("timestep"))
        tensors = (value for value in arguments.values() if isinstance(value, torch.Tensor))
        device = next((tensor.device for tensor in tensors), torch.device("cpu"))
        branch = self.reuse.begin(
            step,
            self.steps.generation,
            (layer.maps for layer in self.layers),
            max_branches=self.steps.max_branches,
        )
        plan = self._common_plan(model, arguments)
        self._check_size(plan.grid, step)
        if plan.ranks is not None:
            self._prepare_ranks(model, plan.ranks, device)
        schedule = self._schedule(step, device)
        for layer, module in self.pairs:
            groups = self._groups(schedule, step, layer, plan.grid)
            layer.current.step = step
            layer.parts = parts_of(module)
            self._plan_layer(layer, self._plan_of(layer, plan, groups, branch), device)
        if self.settings.telemetry:
            grid = (plan.grid.frames, plan.grid.height, plan.grid.width)
            stats = [layer.current.stats for layer in self.layers]
            forward = Forward(self.name, step, grid, stats)
            self.telemetry.record(forward, -1 if step is None else self.steps.generation)

    def _check_size(self, grid: TokenGrid, step: int | None) -> None:
        """Hold the size of a forward against what the schedule was calibrated for, once each."""
        tokens = (grid.frames, grid.height, grid.width)
        here = (tokens, None if step is None else self.steps.num_steps)
        if here != self._matched:
            self.settings.schedule.check_match(tokens=here[0], steps=here[1])
            self._matched = here

    def _step(self, model: nn.Module, timestep: Any) -> int | None:
        """The denoising step of this forward; None with gradients, where timesteps are random."""
        schedule = self.settings.schedule
        if torch.is_grad_enabled():
            if not model.training and schedule != schedule.without_steps():
                _warn_about_gradients()
            return None
        step = self.steps.observe(timestep)
        by_step = schedule.reuses_maps or schedule != schedule.without_steps()
        if self.steps.is_foreign and (by_step or schedule.needs & {"step", "memory"}):
            raise ValueError(
                "another thread is in the middle of a generation with this model, and the schedule "
                "has rules about steps, which are counted over one generation. Give each thread a "
                "model of its own, or a schedule without such rules."
            )
        if step == 0 and 0 < self.steps.turned_after <= schedule.dense_first_steps:
            _warn_about_random_steps(schedule)
        return step

    def _common_plan(self, model: nn.Module, arguments: Mapping[str, Any]) -> Plan:
        """The part of the plan that all layers of this forward share."""
        row, settings = self.row, self.settings
        grid = TokenGrid(*row.grid(model, arguments), segments=packed_clips(arguments))
        ranks = ranks_of(model, grid, num_heads(next(iter(self.modules.values()))))
        return Plan(
            grid=grid,
            config=DENSE,
            text=row.text,
            prefix=row.prefix(model, arguments) if row.prefix else 0,
            is_block_order=row.is_block_order,
            backend=settings.backend,
            # Ranks share heads by their densities.
            telemetry=settings.telemetry or ranks is not None,
            ranks=ranks,
            guidance_batch=self._guidance_batch(arguments),
        )

    def _guidance_batch(self, arguments: Mapping[str, Any]) -> int:
        """Samples of this forward, where they are the two halves of guidance that share a map."""
        is_shared = self.settings.schedule.reuse_guidance and self.row.guidance_in_batch
        if not is_shared or self.steps.is_guided is False:
            return 0
        tensors = (value for value in arguments.values() if isinstance(value, torch.Tensor))
        return next((len(value) for value in tensors if value.ndim), 0)

    def _plan_of(
        self, layer: Layer, plan: Plan, groups: list[HeadGroup], branch: int | None
    ) -> Plan:
        """The plan of one layer, with one for each group of heads where there are several."""
        if len(groups) == 1:
            return self._plan_heads(layer, plan, groups[0], branch)
        plans = tuple(
            replace(self._plan_heads(layer, plan, group, branch), heads=group.heads)
            for group in groups
        )
        weights = dict.fromkeys(name for each in plans for name in each.weights)
        return replace(plan, groups=plans, weights=tuple(weights))

    def _plan_heads(self, layer: Layer, plan: Plan, group: HeadGroup, branch: int | None) -> Plan:
        """The plan of heads that do the same.

        It refers to the layer only where maps are kept or observed.
        """
        rules = self.settings.schedule
        plan = self._with_moment(plan.with_config(group.config), layer)
        # A window's map is cached elsewhere, and what has a memory looks at every step itself.
        is_kept = group.config.is_adaptive and (group.reuse_steps > 1 or rules.reuse_guidance)
        is_kept = is_kept and plan.memory is None
        branch = branch if is_kept else None
        if branch is None and not layer.observers:
            return plan
        if branch is not None and self.reuse.is_new(group.reuse_steps):
            layer.maps.forget(group.heads if len(group.heads) < layer.num_heads else None)
        return replace(plan, layer=ref(layer), branch=branch)

    def _with_moment(self, plan: Plan, layer: Layer) -> Plan:
        """The plan with what its methods need to know of step and layer, and their parts."""
        needs = plan.config.needs
        weights = layer.weights(plan.config)
        if not weights and not needs & {"step", "layer", "memory", "table"}:
            return plan
        step = layer.current.step
        moment = Moment(
            step=step,
            num_steps=self.steps.num_steps,
            layer=layer.index,
            num_layers=len(self.layers),
        )
        memory = None
        if "memory" in needs and step is not None:
            memory = (self.steps.generation, self.steps.stage, self.reuse.call)
        return replace(plan, moment=moment, memory=memory, layer=ref(layer), weights=weights)

    def _schedule(self, step: int | None, device: torch.device) -> Schedule:
        """The rules of a forward on this device."""
        schedule = self.settings.schedule
        if self.settings.has_auto_min_tokens:
            least = min_tokens_here(device, schedule.min_tokens)
            schedule = replace(schedule, min_tokens=least)
        if step is None:
            return schedule.without_steps()
        if self.steps.has_later_stages:
            # Last steps are looked for in the last stage, where their number is known.
            return replace(schedule, dense_last_steps=0)
        last, steps = schedule.dense_last_steps, self.steps.num_stage_steps
        if self.steps.stage and steps is not None and last > steps:
            raise ValueError(
                f"dense_last_steps must lie within the pyramid's last stage, of {steps} steps: got "
                f"{last}. Stages before it do not say how many steps follow."
            )
        return schedule

    def _groups(
        self, schedule: Schedule, step: int | None, layer: Layer, grid: TokenGrid
    ) -> list[HeadGroup]:
        return schedule.groups_for(
            step or 0,
            layer.index,
            layer.num_heads,
            num_steps=self.steps.num_steps,
            num_layers=len(self.layers),
            num_tokens=grid.num_tokens,
        )

    def _plan_layer(self, layer: Layer, plan: Plan, device: torch.device) -> None:
        # diffusers' own parallel attention knows no joint text, nor processors that need a port.
        needs_ranks = plan.ranks is not None and bool(self.row.text or self.row.ports)
        is_whole = plan.grid.segments is None and not needs_ranks
        current = layer.current
        current.is_dense = plan.is_dense and is_whole
        current.stats = None
        if current.is_dense:
            return
        current.key = plan_key(plan)
        current.methods = tuple(dict.fromkeys(method for method, _ in plan.weights))
        current.takes_hidden = any("hidden" in methods.find(name).needs for name in current.methods)
        if plan.telemetry:
            current.stats = torch.full((3, layer.num_heads), float("nan"), device=device)

    def _prepare_ranks(self, model: nn.Module, ranks: Ranks, device: torch.device) -> None:
        if self.row.no_ranks is not None:
            raise ValueError(
                f"{self.row.name} cannot share one video over processes: {self.row.no_ranks}"
            )
        if model.training and torch.is_grad_enabled() and not self.row.cp_trains:
            raise ValueError(
                f"{self.row.name} cannot train with context parallelism: its last layers would get "
                "whole gradients where all others get partial ones. Use model.eval() or no_grad()."
            )
        # Kept maps are those of the heads that a rank has, so these stay while maps do.
        if self.reuse.is_fresh:
            self._balance_heads(ranks, device)
        if self.row.cp_plan is not None:
            if shares_arguments(model):
                raise ValueError(
                    f"enable_parallelism took diffusers' plan of {self.row.name}, which shares the "
                    "text too. Apply NABLA first, which brings a plan that keeps it whole."
                )
            ours = set(map(id, self.modules.values()))
            keep_ranks_from(part for part in model.modules() if id(part) not in ours)

    def _balance_heads(self, ranks: Ranks, device: torch.device) -> None:
        """Share heads by the densities of the last forward; the same on all ranks."""
        measured = [layer.current for layer in self.layers if layer.current.stats is not None]
        if not measured:
            return
        loads = torch.stack([current.stats[0] for current in measured if current.stats is not None])
        for current, load in zip(measured, loads.cpu().tolist(), strict=True):
            if load[0] == load[0]:
                order = balanced_order(load, ranks.count)
                current.order = torch.tensor(order, device=device)


def _warn_about_gradients() -> None:
    # Python shows one place's warning once.
    warnings.warn(
        "the schedule has rules about steps, which are for generation: with gradients they do not "
        "apply. Use torch.no_grad().",
        stacklevel=2,
    )


def _warn_about_random_steps(schedule: Schedule) -> None:
    warnings.warn(
        "a generation was dense throughout: its timesteps turned back within the first "
        f"{schedule.dense_first_steps} steps, which the schedule keeps dense. If timesteps are "
        "random (validation), pass a schedule without dense_first_steps: schedule="
        f"nabla_attn.Schedule(algorithm=nabla_attn.parse('{schedule.algorithm}')).",
        stacklevel=2,
    )
