"""The memory that one process of a training run takes, before its first step."""

from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from nabla_attn.cost.memory import MemoryEstimate, activation_bytes, sparse_bytes, traced_peak
from nabla_attn.training.loader import to_device
from nabla_attn.training.noise import noise_batch
from nabla_attn.training.setup import TrainRun

FLOAT32 = 4
REMEDY = (
    "Use gradient_checkpointing=true, precision=bfloat16, lora.rank=16, a smaller data.batch with "
    "accumulation, or smaller clips"
)


def estimate_training(run: TrainRun) -> MemoryEstimate:
    """Estimate the memory of a run: its states, and a step of its largest batch without data.

    The step is that of the dense transformer, with what sparse attention adds; adapters count as
    if all weights were trained, which is more than they take.

    Args:
        run: The run.
    """
    is_cpu = run.accelerator.device.type == "cpu"
    shares = run.accelerator.num_processes if run.config.sharding == "fsdp" else 1
    step = _step_bytes(run, is_cpu=is_cpu) // max(1, run.config.context_parallel)
    return MemoryEstimate(
        _state_bytes(run) // shares + _teacher_bytes(run),
        {"taking a step": step},
    )


def _state_bytes(run: TrainRun) -> int:
    """Weights, gradients, AdamW's two averages, and the running average of the weights."""
    trained = sum(p.numel() for p in run.trained())
    weights = sum(p.numel() * p.element_size() for p in run.bare.parameters())
    return weights + trained * FLOAT32 * (4 if run.config.ema else 3)


def _teacher_bytes(run: TrainRun) -> int:
    if run.config.objective.kind != "distill" or run.config.lora.rank:
        return 0
    item = 2 if run.config.precision == "bfloat16" else FLOAT32
    return item * sum(p.numel() for p in run.bare.parameters())


def _step_bytes(run: TrainRun, *, is_cpu: bool) -> int:
    """Activations that the forward saves and the backward holds, beside the gradients."""
    batch, generator = run.loader.largest()
    noised = noise_batch(run.objective.path, to_device(batch, run.accelerator.device), generator)
    with torch.no_grad():
        arguments = run.objective.inputs(noised.latents, noised.timestep, batch["conditions"])
    config, kind = run.bare.config, type(run.bare)
    has_autocast = run.config.precision == "bfloat16"

    def build() -> Any:
        # On the CPU whatever the device: only sizes count.
        model: Any = kind.from_config(config).train()
        if run.config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)  # counted among the states
        hollow = tree_map_only(
            torch.Tensor, lambda value: torch.empty(value.shape, dtype=value.dtype), arguments
        )

        def step() -> None:
            with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, has_autocast):
                out = model(**hollow, return_dict=False)
                predicted = out[0] if isinstance(out, tuple) else out
                loss = predicted.float().square().mean()
            loss.backward()

        return step

    batch_size, *shape = batch["latents"].shape
    tokens = batch_size * run.tokens(shape)
    heads = config.get("num_attention_heads") or 1
    width = config.get("model_dim") or heads * (config.get("attention_head_dim") or 1)
    item = 2 if has_autocast else FLOAT32
    try:
        traced = traced_peak(build, is_cpu=is_cpu)
    except Exception:  # code of a model that needs the data itself: one layer's work is left
        traced = int(activation_bytes(tokens, width, 4 * width, heads, item))
    return traced + sparse_bytes(tokens, width, heads, 64, item)
