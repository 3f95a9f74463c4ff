"""Before the first step: whether the data fits the model, and what a run will take."""

import math
import time
from pathlib import Path

import torch

from nabla_attn.cost.memory import MemoryEstimate
from nabla_attn.errors import first_line
from nabla_attn.training.loader import to_device
from nabla_attn.training.memory import estimate_training
from nabla_attn.training.setup import TrainRun
from nabla_attn.training.trainer import Trainer


def probe(run: TrainRun) -> float:
    """Run the objective once on the largest grid, without gradients.

    Returns:
        The seconds it took.

    Raises:
        ValueError: The model cannot take the data.
    """
    batch, generator = run.loader.largest()
    module = run.module if run.config.sharding == "fsdp" else run.bare
    run.sparsity.set_target()
    started = time.perf_counter()
    try:
        with torch.random.fork_rng(), torch.no_grad(), run.accelerator.autocast():
            run.objective(module, to_device(batch, run.accelerator.device), generator)
    except (RuntimeError, TypeError, KeyError, IndexError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        shape = tuple(batch["latents"].shape)
        raise ValueError(
            f"the model cannot take latents of {shape} with conditions "
            f"{sorted(batch['conditions'])}: {first_line(error)}. Encode the data with the model "
            "that is trained."
        ) from error
    return time.perf_counter() - started


def foresee(run: TrainRun, steps: int, seconds: float, memory: MemoryEstimate) -> dict[str, str]:
    """What a run will take: its clips, steps, memory and time.

    Args:
        run: The run.
        steps: Number of steps that are left.
        seconds: Seconds of one batch of the largest grid, forward and backward.
        memory: The memory of one process.
    """
    config, loader = run.config, run.loader
    clips = config.data.batch * config.accumulation * loader.replicas
    unit = "pack" if config.data.pack else "clip"
    grids = _count(len(loader.shapes()), "grid")
    total = seconds * config.accumulation * steps
    return {
        "data": f"{_count(len(loader.trained_on), 'clip')} of {grids}, "
        f"{len(loader.held_out)} held out",
        "steps": f"{steps:,}, of {_count(clips, unit)} each",
        "memory": str(memory),
        "time": f"about {describe_seconds(total)} at most, if all batches are like the largest",
    }


def describe_seconds(seconds: float) -> str:
    """A duration such as `2 h 05 min`, `4 min 10 s` or `12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def check(run: TrainRun, folder: Path) -> dict[str, str]:
    """Run one batch forward and backward and say what would happen; nothing is changed or written.

    Returns:
        What to show, by name.

    Raises:
        ValueError: The data does not fit, or the loss or its gradient is not finite.
    """
    probe(run)
    config = run.config
    batch, generator = run.loader.largest()
    run.sparsity.set_target()
    run.module.train()
    started = time.perf_counter()
    with run.accelerator.autocast():
        terms = run.objective(run.module, to_device(batch, run.accelerator.device), generator)
    run.accelerator.backward(terms["loss"])
    seconds = time.perf_counter() - started
    gradients = [p.grad for p in run.trained() if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    run.optimizer.zero_grad(set_to_none=True)
    loss = float(terms["loss"].detach())
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise ValueError(
            f"the first batch gives loss {loss} and gradient norm {norm}, which are not finite. "
            "Look for clips that are not, or use precision=float32."
        )
    largest, layers = tuple(batch["latents"].shape[1:]), run.sparsity.densities()
    trained = sum(p.numel() for p in run.trained())
    total = sum(p.numel() for p in run.bare.parameters())
    values = [f"{name} {float(term.detach()):.4g}" for name, term in terms.items()]
    result = "LoRA weights" if config.lora.rank else "a pipeline"
    shown = {
        "model": f"{type(run.bare).__name__}, {trained:,} of {total:,} weights trained",
        "largest": f"{run.tokens(largest):,} tokens, latents {'x'.join(map(str, largest))}",
        "attention": _describe_attention(str(run.sparsity.schedule.algorithm), layers),
        "objective": ", ".join(values),
        "gradient": f"norm {norm:.4g}, clipped to {config.optim.max_norm or 'nothing'}",
        "writes": f"checkpoints every {config.checkpoint.every} steps, then {result}, to {folder}",
    }
    shown |= foresee(run, config.steps, seconds, estimate_training(run))
    if run.accelerator.device.type == "cuda":
        shown["memory"] += (
            f"; {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB were used at most"
        )
    if last := Trainer(run, folder).checkpoints.latest():
        shown["resume"] = f"{last} is there; --resume continues from it"
    return shown


def _describe_attention(algorithm: str, layers: list[float]) -> str:
    if not layers:
        return algorithm
    mean = sum(layers) / len(layers)
    return f"{algorithm}, density {mean:.3f} ({min(layers):.3f} to {max(layers):.3f} over layers)"


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}" + ("" if number == 1 else "s")
