"""Processes: what accelerate is asked for, and sequences that several processes share."""

import os
from collections.abc import Sequence
from typing import Any

import torch

from nabla_attn.training.config import TrainConfig


def make_accelerator(config: TrainConfig, transformer: Any) -> Any:
    """The Accelerator of a run, under python, `accelerate launch` or `torchrun`.

    Args:
        config: Precision, sharding, processes to a sequence.
        transformer: Names the blocks that FSDP shards.

    Raises:
        ValueError: FSDP without GPUs, or processes that do not divide.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # Another run in this process may have had another precision.
    AcceleratorState._reset_state()
    options: dict[str, Any] = {}
    if config.sharding == "fsdp":
        if not torch.cuda.is_available():
            raise ValueError(
                "sharding=fsdp needs GPUs, and there is none here. Use sharding=none: every "
                "process then holds the whole model."
            )
        options["fsdp_plugin"] = _fsdp_plugin(transformer)
    mixed = "bf16" if config.precision == "bfloat16" else "no"
    # Unless it is told, accelerate makes nothing of several processes without GPUs.
    on_cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(mixed_precision=mixed, cpu=on_cpu, **options)
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        raise ValueError(
            f"{expected} processes were started, but accelerate sees {accelerator.num_processes}."
        )
    if accelerator.num_processes % config.context_parallel:
        raise ValueError(
            f"context_parallel={config.context_parallel} does not divide the "
            f"{accelerator.num_processes} processes. Start a multiple of it."
        )
    return accelerator


def share_sequences(modules: Sequence[Any], count: int, device: torch.device) -> None:
    """Let `count` processes share every sequence of some transformers (Ulysses).

    Args:
        modules: Transformers of diffusers, with NABLA already applied where it is.
        count: Processes to a sequence; 1 is none.
        device: Of this process.

    Raises:
        ValueError: A model has no plan for it, or there are no GPUs, which diffusers asks for.
    """
    if count == 1:
        return
    if torch.accelerator.device_count() == 0:
        raise ValueError("context_parallel needs GPUs, and there is none here. Leave it at 1.")
    from diffusers import ContextParallelConfig
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh

    shape = (get_world_size() // count, 1, count)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replica", "ring", "ulysses"))
    for module in modules:
        if getattr(module, "_cp_plan", None) is None:
            raise ValueError(
                f"{type(module).__name__} has no plan for context_parallel. Use context_parallel=1."
            )
        module.enable_parallelism(config=ContextParallelConfig(ulysses_degree=count, mesh=mesh))


def reshard(module: torch.nn.Module) -> None:
    """Let FSDP give back what a forward without gradients has gathered; no effect without FSDP.

    Until then the outermost weights are whole copies, which see no change of the shards.
    """
    for part in module.modules():
        give_back: Any = getattr(part, "reshard", None)
        if give_back is not None:
            give_back()


def _fsdp_plugin(transformer: Any) -> Any:
    from accelerate import FullyShardedDataParallelPlugin

    blocks = getattr(transformer, "_repeated_blocks", None) or transformer._no_split_modules
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=list(blocks),
    )
