"""Where the parts of a Wan pipeline run, and how processes share them."""

from dataclasses import dataclass
from typing import Any

import torch

from nabla_attn import distributed
from nabla_attn.models import find_row
from nabla_attn.sizes import denoisers


@dataclass(frozen=True)
class WanPlacement:
    """Where the parts run and how they share memory.

    Attributes:
        device: `"auto"` or a torch device.
        dtype: Dtype of transformer and image encoder, a name or `"auto"`.
        offload_model: Whether to keep only the part at work on the GPU; None is yes on one GPU.
        t5_cpu: Whether the text encoder runs on the CPU.
        t5_fsdp: Whether processes share the weights of the text encoder.
        dit_fsdp: Whether processes share the weights of the transformer.
        ulysses_size: Number of processes that share one sequence, head-wise.
        ring_size: Number of processes that share one sequence, ring-wise; dense only.
        vae_tiling: Whether to decode in tiles, with less memory and slightly other numbers.
    """

    device: str = "auto"
    dtype: str = "auto"
    offload_model: bool | None = None
    t5_cpu: bool = False
    t5_fsdp: bool = False
    dit_fsdp: bool = False
    ulysses_size: int = 1
    ring_size: int = 1
    vae_tiling: bool = False


def check_placement(placement: WanPlacement, *, is_sparse: bool) -> None:
    """Check that the processes can do what is asked of them, before anything is loaded.

    Raises:
        ValueError: Weights are shared without processes to share with, numbers do not multiply to
            the processes, or ring attention meets a sparse algorithm.
    """
    ulysses, ring, processes = (
        placement.ulysses_size,
        placement.ring_size,
        distributed.num_processes(),
    )
    if ulysses < 1 or ring < 1:
        raise ValueError(f"ulysses_size and ring_size start at 1, got {ulysses} and {ring}.")
    if ring > 1 and is_sparse:
        raise ValueError(
            "ring attention passes keys along piece by piece, so no process sees the whole map "
            "that a sparse algorithm selects from. Use --ulysses_size, or --sparse_algo dense."
        )
    wants = placement.t5_fsdp or placement.dit_fsdp or ulysses * ring > 1
    if wants and processes == 1:
        raise ValueError(
            "t5_fsdp, dit_fsdp, ulysses_size and ring_size share work between processes, and there "
            "is one. Start with: torchrun --nproc_per_node=N generate.py ..."
        )
    if ulysses * ring > 1 and ulysses * ring != processes:
        raise ValueError(
            f"ulysses_size * ring_size must be the number of processes: {ulysses} * {ring} is not "
            f"{processes}."
        )
    if ulysses * ring > 1 and torch.accelerator.device_count() == 0:
        raise ValueError(
            "ulysses_size and ring_size go through diffusers, which places each process on a GPU; "
            "this machine has none. Leave them at 1; t5_fsdp and dit_fsdp work on CPUs."
        )
    if placement.t5_cpu and placement.t5_fsdp:
        raise ValueError("t5_cpu and t5_fsdp exclude each other. Pass one.")
    if placement.offload_model and placement.dit_fsdp:
        raise ValueError("offload_model moves whole parts, dit_fsdp shards them. Pass one.")


def distribute(pipe: Any, placement: WanPlacement, device: torch.device) -> None:
    """Share the parts that were asked for between the processes.

    Raises:
        ValueError: Heads do not split over the processes.
    """
    if distributed.num_processes() == 1:
        return
    distributed.join_process_group(device)
    for model in denoisers(pipe):
        if placement.ulysses_size * placement.ring_size > 1:
            row = find_row(model)
            distributed.split_sequence(
                model,
                ulysses_size=placement.ulysses_size,
                ring_size=placement.ring_size,
                plan=row.cp_plan(model) if row is not None and row.cp_plan else None,
            )
        if placement.dit_fsdp:
            distributed.share_weights(model, model.blocks, device)
    if placement.t5_fsdp and pipe.text_encoder is not None:
        distributed.share_weights(pipe.text_encoder, pipe.text_encoder.encoder.block, device)
