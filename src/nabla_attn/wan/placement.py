"""Several processes at one video: FSDP by torch, Ulysses and ring by diffusers."""

from typing import TYPE_CHECKING, Any

import torch

from nabla_attn.distributed import join_process_group, num_processes

if TYPE_CHECKING:
    from nabla_attn.wan.command import WanPlacement


def check(placement: "WanPlacement", *, is_sparse: bool) -> None:
    """Refuse what these processes cannot do, before anything is loaded.

    Raises:
        ValueError: sharding without processes to share with, numbers that do not multiply to the
            processes, or ring attention with a sparse algorithm.
    """
    ulysses, ring, processes = placement.ulysses_size, placement.ring_size, num_processes()
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


def distribute(pipe: Any, placement: "WanPlacement", device: torch.device) -> None:
    """Shard the parts that were asked for over the processes.

    Raises:
        ValueError: heads do not split over the processes.
    """
    if num_processes() == 1:
        return
    join_process_group(device)
    transformers = [pipe.transformer, getattr(pipe, "transformer_2", None)]
    for model in (model for model in transformers if model is not None):
        if placement.ulysses_size * placement.ring_size > 1:
            _split_sequence(model, placement)
        if placement.dit_fsdp:
            _shard(model, model.blocks, device)
    if placement.t5_fsdp and pipe.text_encoder is not None:
        _shard(pipe.text_encoder, pipe.text_encoder.encoder.block, device)


def _split_sequence(model: Any, placement: "WanPlacement") -> None:
    from diffusers import ContextParallelConfig

    from nabla_attn.models.table import find_row

    heads = model.config.num_attention_heads
    if heads % placement.ulysses_size:
        raise ValueError(
            f"{heads} heads do not split over {placement.ulysses_size} processes. Pass an "
            "ulysses_size that divides them."
        )
    if placement.ring_size > 1:
        if model.dtype == torch.float32:
            raise ValueError("ring attention runs in half precision. Use --dtype bfloat16.")
        # The pieces of a ring are joined by their log-sum-exp, which the default kernel keeps back.
        model.set_attention_backend("_native_flash")
    config = ContextParallelConfig(
        ulysses_degree=placement.ulysses_size, ring_degree=placement.ring_size
    )
    own = getattr(model, "_cp_plan", None)
    row = find_row(model)
    plan = row.cp_plan(model) if own is None and row is not None and row.cp_plan else None
    model.enable_parallelism(config=config, cp_plan=plan)


def _shard(model: Any, blocks: Any, device: torch.device) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (num_processes(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
