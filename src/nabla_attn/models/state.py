"""The state of one model instance: it plans each forward."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast
from weakref import ref

import torch
from torch import nn

from nabla_attn.config import DENSE, SparseConfig
from nabla_attn.core.grid import TokenGrid
from nabla_attn.machine import min_tokens_here
from nabla_attn.models.checkpointing import unwrap_checkpoint, wrap_checkpoint
from nabla_attn.models.grids import packed_clips
from nabla_attn.models.hook import STATE_NAME, PlanForward
from nabla_attn.models.map_memory import Reuse
from nabla_attn.models.modules import attention_modules, num_heads, set_processor
from nabla_attn.models.parallel import (
    Ranks,
    balanced_order,
    keep_ranks_from,
    ranks_of,
    shares_arguments,
)
from nabla_attn.models.plan import Layer, Plan, plan_key
from nabla_attn.models.processor import NablaProcessor, make_processor, open_door
from nabla_attn.models.row import ModelRow
from nabla_attn.models.steps import StepCounter
from nabla_attn.models.telemetry import Forward, Telemetry
from nabla_attn.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the user asked of `apply`, the same for all transformers of a pipeline."""

    schedule: Schedule
    has_auto_min_tokens: bool = False
    backend: str = "auto"
    telemetry: bool = True
    keep_first_frame: bool = False
    pair_queries: str | None = None


class ModelState:
    """Everything NABLA keeps about one model; lives on the model, so copies get their own.

    Args:
        name: the model's name in its pipeline, for reports.
        model: the model, hooks not yet installed.
        row: its row in the table.
        settings: what the user asked for.
        steps: step counter, shared by the transformers of a pipeline.
        telemetry: collector of statistics, shared like `steps`.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        row: ModelRow,
        settings: Settings,
        steps: StepCounter,
        telemetry: Telemetry,
    ) -> None:
        self.name = name
        self.row = row
        self.settings = settings
        self.steps = steps
        self.telemetry = telemetry
        self.modules = attention_modules(model, row)
        self.layers = [Layer(path) for path in self.modules]
        settings.schedule.check_layers(len(self.layers))
        self.reuse = Reuse(settings.schedule)
        self.hook: Any = None
        self.has_own_plan = False
        self._hooked: ref[nn.Module] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy does not belong to the original's wrapper.
        return self.__dict__ | {"_hooked": None}

    def install(self, model: nn.Module, hooked: nn.Module) -> None:
        """Put the processors in place and hook the forward of `hooked`, `model` or its wrapper.

        Raises:
            ValueError: a processor cannot be replaced; the model is left as it was.
        """
        setattr(model, STATE_NAME, self)
        self._hooked = ref(hooked)
        self.hook = hooked.register_forward_pre_hook(PlanForward(), with_kwargs=True)
        try:
            self._place_processors()
        except ValueError:
            self.uninstall(model)
            raise
        plan = self.row.cp_plan(model) if self.row.cp_plan is not None else None
        if plan is not None and "_cp_plan" not in vars(model):
            # Seen by `enable_parallelism` instead of the class's own.
            cast(Any, model)._cp_plan = plan
            self.has_own_plan = True

    def install_again(self, model: nn.Module) -> None:
        """Put back what `uninstall` took, where it was."""
        hooked = self._hooked() if self._hooked is not None else None
        self.install(model, model if hooked is None else hooked)

    def uninstall(self, model: nn.Module) -> None:
        """Take everything back."""
        self.hook.remove()
        for layer, module in zip(self.layers, self.modules.values(), strict=True):
            layer.memory.forget()
            # Who kept the processor may put it back.
            layer.is_dense = True
            if isinstance(module.processor, NablaProcessor):
                set_processor(module, module.processor.original)
        unwrap_checkpoint(model)
        if self.has_own_plan:
            delattr(model, "_cp_plan")
            self.has_own_plan = False
        delattr(model, STATE_NAME)

    def _place_processors(self) -> None:
        """Stand in for every processor that is not ours (users and fused QKV set new ones)."""
        for layer, module in zip(self.layers, self.modules.values(), strict=True):
            original = module.processor
            if isinstance(original, NablaProcessor):
                if original.layer is layer:
                    continue
                # Of an earlier `apply`, put back by who kept it (unfused QKV).
                original = original.original
            port = self.row.ports.get(type(original).__name__, open_door)
            set_processor(module, make_processor(original, layer, port))

    def plan(self, model: nn.Module, arguments: Mapping[str, Any]) -> None:
        """Decide for every layer what it does in this forward."""
        self._place_processors()
        if torch.is_grad_enabled():
            wrap_checkpoint(model, self.layers, list(self.modules.values()))
        step = self._step(model, arguments.get("timestep"))
        tensors = (value for value in arguments.values() if isinstance(value, torch.Tensor))
        device = next((tensor.device for tensor in tensors), torch.device("cpu"))
        branch = self.reuse.begin(
            step,
            self.steps.generation,
            (layer.memory for layer in self.layers),
            max_branches=self.steps.max_branches,
        )
        plan = self._common_plan(model, arguments)
        if plan.ranks is not None:
            self._prepare_ranks(model, plan.ranks, device)
        schedule = self._schedule(step, device)
        for index, layer in enumerate(self.layers):
            config = self._config(schedule, step, index, plan.grid)
            self._plan_layer(layer, self._with_memory(plan, config, branch, layer), device)
        if self.settings.telemetry:
            grid = (plan.grid.frames, plan.grid.height, plan.grid.width)
            forward = Forward(self.name, step, grid, [layer.stats for layer in self.layers])
            self.telemetry.record(forward, -1 if step is None else self.steps.generation)

    def _step(self, model: nn.Module, timestep: Any) -> int | None:
        """The denoising step of this forward; None with gradients, where timesteps are random."""
        schedule = self.settings.schedule
        if torch.is_grad_enabled():
            if not model.training and schedule != _without_steps(schedule):
                _warn_about_gradients()
            return None
        step = self.steps.observe(timestep)
        if step == 0 and 0 < self.steps.turned_after <= schedule.dense_first_steps:
            _warn_about_random_steps(schedule)
        return step

    def _common_plan(self, model: nn.Module, arguments: Mapping[str, Any]) -> Plan:
        """What is the same for all layers of this forward."""
        row, settings = self.row, self.settings
        grid = TokenGrid(*row.grid(model, arguments), segments=packed_clips(arguments))
        ranks = ranks_of(model, grid, num_heads(next(iter(self.modules.values()))))
        return Plan(
            grid=grid,
            config=DENSE,
            text=row.text,
            prefix=row.prefix(model, arguments) if row.prefix else 0,
            in_block_order=row.in_block_order,
            backend=settings.backend,
            keep_first_frame=settings.keep_first_frame,
            pair_queries=settings.pair_queries,
            # Ranks share heads by their densities.
            telemetry=settings.telemetry or ranks is not None,
            ranks=ranks,
        )

    def _with_memory(
        self, plan: Plan, config: SparseConfig, branch: int | None, layer: Layer
    ) -> Plan:
        """The layer's plan; a window's map needs no memory."""
        plan = plan.with_config(config)
        if branch is None or not config.is_adaptive:
            return plan
        in_batch = self.settings.schedule.reuse_guidance and self.row.guidance_in_batch
        return replace(
            plan,
            memory=ref(layer.memory),
            branch=branch,
            is_guidance_batch=in_batch and self.steps.is_guided is not False,
        )

    def _schedule(self, step: int | None, device: torch.device) -> Schedule:
        """The rules of a forward on this device."""
        schedule = self.settings.schedule
        if self.settings.has_auto_min_tokens:
            least = min_tokens_here(device, schedule.min_tokens)
            schedule = replace(schedule, min_tokens=least)
        return _without_steps(schedule) if step is None else schedule

    def _config(
        self, schedule: Schedule, step: int | None, index: int, grid: TokenGrid
    ) -> SparseConfig:
        return schedule.config_for(
            step or 0,
            index,
            num_steps=self.steps.num_steps,
            num_layers=len(self.layers),
            num_tokens=grid.num_tokens,
        )

    def _plan_layer(self, layer: Layer, plan: Plan, device: torch.device) -> None:
        # diffusers' own parallel attention does not know joint text, nor processors without a door.
        needs_ranks = plan.ranks is not None and bool(self.row.text or self.row.ports)
        is_whole = plan.grid.segments is None and not needs_ranks
        layer.is_dense = plan.config.is_dense and is_whole
        layer.stats = None
        if layer.is_dense:
            return
        layer.key = plan_key(plan)
        if plan.telemetry:
            heads = num_heads(self.modules[layer.name])
            layer.stats = torch.full((2, heads), float("nan"), device=device)

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
        measured = [layer for layer in self.layers if layer.stats is not None]
        if not measured:
            return
        loads = torch.stack([layer.stats[0] for layer in measured if layer.stats is not None])
        for layer, load in zip(measured, loads.cpu().tolist(), strict=True):
            if load[0] == load[0]:
                order = balanced_order(load, ranks.count)
                layer.order = torch.tensor(order, device=device)


def _without_steps(schedule: Schedule) -> Schedule:
    """Training sees random timesteps, so rules about steps do not apply."""
    return replace(schedule, dense_first_steps=0, dense_last_steps=0, step_overrides={})


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
