"""Everything a run needs before its first step: processes, module, attention, objective, data.

Packed clips do not see each other, nor each other's text: self-attention is cut by the segments of
the token grid (`TokenGrid.segments`), cross-attention by a mask. Rotary positions are relative, so
a clip need not start at frame 0.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from nabla_attn.distributed import make_accelerator, reshard, share_sequences
from nabla_attn.models import METHOD_PARTS
from nabla_attn.sizes import patch_size
from nabla_attn.training.adapters import add_lora, bare_teacher, copied_teacher, freeze
from nabla_attn.training.config import TrainConfig
from nabla_attn.training.data import EncodedSet
from nabla_attn.training.families import SEGMENTS, TEXTS, Family, find_family
from nabla_attn.training.loader import BatchLoader
from nabla_attn.training.model import Parts
from nabla_attn.training.noise import path_of, served_levels
from nabla_attn.training.objective import Distillation, FlowMatching, Objective, Teacher
from nabla_attn.training.sparsity import Sparsity, may_idle


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
        has_idle_weights=may_idle(config.sparsity),
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
    if not trained:
        raise ValueError(
            f"sparsity.parts_only trains parts of methods, and {sparsity.schedule.algorithm} has "
            "none. Use sparsity.algorithm=vsa-0.1 or sla-0.05, or parts_only=false."
        )
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
    elif config.sparsity.parts_only:
        bare.requires_grad_(False)
    elif is_distilled:
        dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        copy, teacher = copied_teacher(bare, dtype)
        sequences.append(copy)
    freeze(bare, family.frozen)
    file = parts.directory / parts.name / METHOD_PARTS
    sparsity = Sparsity(bare, config.sparsity, file if file.is_file() else None)
    if is_distilled and teacher is None:
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


class TextMask:
    """Forward pre-hooks that let each packed clip see its own text alone.

    The mask stays until the next forward, for blocks that gradient checkpointing runs again.
    """

    def __init__(self) -> None:
        self._mask: Tensor | None = None

    def read(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook of the model: read the clips from `attention_kwargs`."""
        packed = kwargs.get("attention_kwargs") or {}
        self._mask = None
        if SEGMENTS in packed:
            hidden = kwargs["hidden_states"]
            config: Any = model.config
            _, rows, columns = config.patch_size
            per_frame = (hidden.shape[3] // rows) * (hidden.shape[4] // columns)
            tokens = [frames * per_frame for frames in packed[SEGMENTS]]
            self._mask = _same_clip(tokens, packed[TEXTS], hidden.device)

    def add(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Hook of a cross-attention (hidden states, text, mask, ...): insert the mask."""
        if self._mask is None:
            return None
        hidden_states, text, _, *rest = args
        return (hidden_states, text, self._mask, *rest)


def let_pack(model: nn.Module, family: Family) -> None:
    """Teach a transformer to keep packed clips apart; NABLA is on it already.

    Raises:
        ValueError: The family's texts cannot be kept apart.
    """
    named = model.named_modules() if family.cross_attention else ()
    found = [part for path, part in named if re.fullmatch(family.cross_attention, path)]
    if not found:
        raise ValueError(
            f"{family.pipeline} cannot train on packed clips: each clip would see the texts of all "
            "of them. Use data.pack=0."
        )
    mask = TextMask()
    model.register_forward_pre_hook(mask.read, with_kwargs=True)
    for module in found:
        module.register_forward_pre_hook(mask.add)


def _same_clip(tokens: Sequence[int], texts: Sequence[int], device: torch.device) -> Tensor:
    """Whether a video token and a text token belong to one clip, bool [1, 1, tokens, texts]."""
    clips = torch.arange(len(tokens), device=device)
    rows = clips.repeat_interleave(torch.tensor(tokens, device=device))
    columns = clips.repeat_interleave(torch.tensor(texts, device=device))
    return (rows[:, None] == columns)[None, None]
