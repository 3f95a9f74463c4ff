"""Processes that work together: which one this is, how they meet, share and stop."""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


def num_processes() -> int:
    """The number of processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def process_index() -> int:
    """The number of this process among them, from 0."""
    return int(os.environ.get("RANK", 0))


def is_first_process() -> bool:
    """Whether this process is the one that writes files and prints."""
    return process_index() == 0


def local_device(device: torch.device) -> torch.device:
    """The device of this process: a plain `cuda` becomes its own GPU."""
    if device.type == "cuda" and device.index is None and num_processes() > 1:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return device


def join_process_group(device: torch.device) -> None:
    """Start torch's process group unless it runs: NCCL for GPUs, Gloo for CPUs."""
    import torch.distributed as dist

    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def same_everywhere(value: Any, device: torch.device) -> Any:
    """The first process's `value` in every process, such as a seed that each drew."""
    if num_processes() == 1:
        return value
    import torch.distributed as dist

    join_process_group(device)
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Turn Ctrl-C and SIGTERM into an event, so that a step is never cut in half."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    kinds = (signal.SIGINT, signal.SIGTERM)
    previous = {kind: signal.signal(kind, lambda *_: stop.set()) for kind in kinds}
    try:
        yield stop
    finally:
        for kind, handler in previous.items():
            signal.signal(kind, handler)


def make_accelerator(
    transformer: Any,
    *,
    precision: str,
    sharding: str,
    context_parallel: int,
    has_idle_weights: bool = False,
) -> Any:
    """The Accelerator of a training run, under python, `accelerate launch` or `torchrun`.

    Args:
        transformer: The trained transformer; its class names the blocks that FSDP shards.
        precision: "float32" or "bfloat16".
        sharding: "none" or "fsdp".
        context_parallel: Number of processes that share one sequence.
        has_idle_weights: Whether some steps leave trained weights without gradients.

    Raises:
        ValueError: FSDP without GPUs, or processes that do not divide.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    # Another run in this process may have had another precision.
    AcceleratorState._reset_state()
    options: dict[str, Any] = {}
    if sharding == "fsdp":
        if not torch.cuda.is_available():
            raise ValueError(
                "sharding=fsdp needs GPUs, and there is none here. Use sharding=none: every "
                "process then holds the whole model."
            )
        options["fsdp_plugin"] = _fsdp_plugin(transformer)
    if has_idle_weights:
        options["kwargs_handlers"] = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    mixed = "bf16" if precision == "bfloat16" else "no"
    # Without `cpu`, accelerate ignores several processes on a machine without GPUs.
    on_cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(mixed_precision=mixed, cpu=on_cpu, **options)
    expected = num_processes()
    if accelerator.num_processes != expected:
        raise ValueError(
            f"{expected} processes were started, but accelerate sees {accelerator.num_processes}."
        )
    if accelerator.num_processes % context_parallel:
        raise ValueError(
            f"context_parallel={context_parallel} does not divide the "
            f"{accelerator.num_processes} processes. Start a multiple of it."
        )
    return accelerator


def share_sequences(modules: Sequence[Any], count: int, device: torch.device) -> None:
    """Let `count` processes share every sequence of some transformers (Ulysses).

    Args:
        modules: Transformers of diffusers; NABLA is already on those that it is meant for.
        count: Number of processes that share a sequence; 1 changes nothing.
        device: The device of this process.

    Raises:
        ValueError: A model has no plan for it, or there are no GPUs, which diffusers requires.
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
    """Let FSDP free what a forward without gradients has gathered; no effect without FSDP.

    Until then the outermost weights are whole copies, which do not follow changes of the shards.
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


def split_sequence(model: Any, *, ulysses_size: int, ring_size: int = 1, plan: Any = None) -> None:
    """Share each sequence of a diffusers transformer between the processes.

    Args:
        model: The transformer, on this process's device.
        ulysses_size: Number of processes that share a sequence by heads.
        ring_size: Number of processes that pass keys and values round in a ring.
        plan: How diffusers splits the arguments of the model's forward, for models that bring no
            plan of their own.

    Raises:
        ValueError: Heads do not split over the processes, or a ring is asked for in float32.
    """
    from diffusers import ContextParallelConfig

    heads = model.config.num_attention_heads
    if heads % ulysses_size:
        raise ValueError(
            f"{heads} heads do not split over {ulysses_size} processes. Pass an ulysses_size that "
            "divides them."
        )
    if ring_size > 1:
        if model.dtype == torch.float32:
            raise ValueError("ring attention runs in half precision. Use --dtype bfloat16.")
        # The pieces of a ring are joined by their log-sum-exp, which the default kernel keeps back.
        model.set_attention_backend("_native_flash")
    config = ContextParallelConfig(ulysses_degree=ulysses_size, ring_degree=ring_size)
    own = getattr(model, "_cp_plan", None)
    model.enable_parallelism(config=config, cp_plan=plan if own is None else None)


def share_weights(model: Any, blocks: Any, device: torch.device) -> None:
    """Share the weights of a model between the processes, block by block (torch's FSDP2)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (num_processes(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
