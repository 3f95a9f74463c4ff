"""Processes that work together: which one this is, where it runs, and how they meet."""

import os
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
