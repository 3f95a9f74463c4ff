"""Everything a run needs before its first step: processes, module, attention, objective, data."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from nabla_attn.distributed import make_accelerator, reshard, share_sequences
from nabla_attn.sizes import patch_size
from nabla_attn.training.adapters import add_lora, bare_teacher, copied_teacher, freeze
from nabla_attn.training.config import TrainConfig
from nabla_attn.training.data import EncodedSet
from nabla_attn.training.families import find_family
from nabla_attn.training.family import Family
from nabla_attn.training.loader import BatchLoader
from nabla_attn.training.model import Parts
from nabla_attn.training.noise import path_of, served_levels
from nabla_attn.training.objective import Distillation, FlowMatching, Objective, Teacher
from nabla_attn.training.packing import let_pack
from nabla_attn.training.sparsity import Sparsity


@dataclass
class TrainRun:
    """The moving parts of a training run.

    Attributes:
        config: The configuration.
        parts: The pipeline's parts; `parts.transformer` is the bare module.
        accelerator: The `Accelerator` of accelerate.
        module: The module as the loop calls it, wrapped for several processes.
        sparsity: The module's attention.
        objective: The loss that is minimised.
        optimizer: AdamW for the trained parameters.
        loader: Batches of training and validation.
        average: Running average of the trained parameters, or None.
        family: The pipeline's family.
    """

    config: TrainConfig
    parts: Parts
    accelerator: Any
    module: nn.Module
    sparsity: Sparsity
    objective: Objective
    optimizer: torch.optim.Optimizer
    loader: BatchLoader
    average: Any
    family: Family

    @property
    def bare(self) -> Any:
        """The transformer inside all wrappers."""
        return self.parts.transformer

    def trained(self) -> list[nn.Parameter]:
        """Parameters that are trained, in a fixed order."""
        return [p for p in self.module.parameters() if p.requires_grad]

    def tokens(self, shape: Sequence[int]) -> int:
        """Number of video tokens in latents without a batch axis."""
        axes = self.family.layout.split()
        sides = [side for side, axis in zip(shape, axes, strict=True) if axis != "c"]
        patch = prod(patch_size(self.bare)) if len(sides) == 3 else 1
        return prod(sides) // patch

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights in place during the block; without an average, do nothing."""
        if self.average is None:
            yield
            return
        reshard(self.module)
        trained = self.trained()
        self.average.store(trained)
        self.average.copy_to(trained)
        try:
            yield
        finally:
            reshard(self.module)
            self.average.restore(trained)


def prepare(config: TrainConfig, parts: Parts, dataset: Any = None) -> TrainRun:
    """Build a run from its configuration.

    Args:
        config: The configuration.
        parts: The parts that `load_parts` returns; the transformer is changed in place.
        dataset: Encoded clips; None reads the folder `config.data.folder`.

    Raises:
        ValueError: Something in the configuration does not fit model, data or machine.
    """
    accelerator = make_accelerator(
        parts.transformer,
        precision=config.precision,
        sharding=config.sharding,
        context_parallel=config.context_parallel,
    )
    family = find_family(parts.pipeline_class, parts.index)
    served = served_levels(parts.index, parts.name)
    path = path_of(parts.scheduler, family, config.objective, served)
    if config.data.pack:
        let_pack(parts.transformer, family)
    if dataset is None:
        dataset = EncodedSet(config.data.folder, family.pipeline)
    replicas = accelerator.num_processes // config.context_parallel
    replica = accelerator.process_index // config.context_parallel
    loader = BatchLoader(dataset, config, replica=replica, replicas=replicas)
    sparsity, teacher = _prepare_module(config, parts, family, accelerator.device)
    bare = parts.transformer
    objective: Objective = FlowMatching(path, family.inputs)
    if teacher is not None:
        objective = Distillation(
            path,
            family.inputs,
            teacher,
            data_weight=config.objective.data_weight,
            layer_weight=config.objective.layer_weight,
            layers=sparsity.layers,
            student=bare,
            guidance=config.objective.guidance,
            parts=config.context_parallel,
        )
    trained = [p for p in bare.parameters() if p.requires_grad]
    module, optimizer = accelerator.prepare(bare, _make_optimizer(config, trained))
    run = TrainRun(
        config, parts, accelerator, module, sparsity, objective, optimizer, loader, None, family
    )
    _check_sharing(run)
    if config.ema:
        from diffusers.training_utils import EMAModel

        run.average = EMAModel(run.trained(), decay=config.ema)
    return run


def _check_sharing(run: TrainRun) -> None:
    count = run.config.context_parallel
    for shape in sorted(set(map(tuple, run.loader.dataset.grids))):
        if run.tokens(shape) % count:
            raise ValueError(
                f"{run.tokens(shape)} tokens of latents {shape} do not divide over "
                f"context_parallel={count} processes. Choose a number that divides them."
            )


def _prepare_module(
    config: TrainConfig, parts: Parts, family: Family, device: torch.device
) -> tuple[Sparsity, Teacher | None]:
    """Adapters, attention and memory savers on the transformer, and its teacher."""
    bare = parts.transformer
    is_distilled = config.objective.kind == "distill"
    teacher: Teacher | None = None
    bare.to(device).requires_grad_(True)
    sequences = [bare]
    if config.lora.rank:
        add_lora(bare, config.lora, config.seed, frozen=family.frozen)
    elif is_distilled:
        dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        copy, teacher = copied_teacher(bare, dtype)
        sequences.append(copy)
    freeze(bare, family.frozen)
    sparsity = Sparsity(bare, config.sparsity)
    if config.lora.rank and is_distilled:
        teacher = bare_teacher(bare, sparsity)
    share_sequences(sequences, config.context_parallel, device)
    if config.gradient_checkpointing:
        bare.enable_gradient_checkpointing()
    if config.compile:
        bare.compile_repeated_blocks()
    return sparsity, teacher


def _make_optimizer(config: TrainConfig, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    optim = config.optim
    return torch.optim.AdamW(
        trained, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
    )
