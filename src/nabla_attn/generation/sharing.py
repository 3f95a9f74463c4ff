"""Several processes at one video of a diffusers pipeline."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from nabla_attn import distributed
from nabla_attn.generation.placement import resolve_device
from nabla_attn.models import find_row
from nabla_attn.sizes import denoisers


@contextmanager
def shared_pipeline(load: Callable[[str], Any], device: str, *, has_maps: bool) -> Iterator[Any]:
    """Yield a pipeline; under torchrun, one whose transformers share each video, head-wise.

    Args:
        load: Loads the pipeline on a device.
        device: A torch device or `"auto"`.
        has_maps: Whether block maps are recorded.

    Raises:
        ValueError: The processes have no GPU each, maps are recorded, or heads do not split.
    """
    processes = distributed.num_processes()
    if processes == 1:
        yield load(device)
        return
    place = distributed.local_device(resolve_device(device))
    gpus, here = torch.accelerator.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if gpus < here or (place.type == "cpu" and torch.cuda.is_available()):
        raise ValueError(
            f"{processes} processes share one video through diffusers, which needs a GPU for each: "
            f"this machine has {gpus}, and --device is {device}. Start one process, or pass "
            "--prompts FILE to make a video in each."
        )
    if has_maps:
        raise ValueError("maps are recorded in one process, which has all heads. Drop torchrun.")
    pipeline = load(str(place))
    try:
        distributed.join_process_group(place)
        for model in denoisers(pipeline):
            row = find_row(model)
            plan = row.cp_plan(model) if row is not None and row.cp_plan else None
            distributed.split_sequence(model, ulysses_size=processes, plan=plan)
        yield pipeline
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
