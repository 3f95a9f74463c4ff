"""A look before the long work: whether the data fits the model, and what a run would do."""

import time
from pathlib import Path

import torch

from nabla_attn.errors import first_line
from nabla_attn.training.feed import to_device
from nabla_attn.training.setup import Run
from nabla_attn.training.trainer import Trainer


def probe(run: Run) -> None:
    """Run the objective once on the largest grid, without gradients.

    Raises:
        ValueError: The model cannot take the data.
    """
    batch, generator = run.feed.largest()
    module = run.module if run.config.sharding == "fsdp" else run.bare
    run.sparsity.set_target()
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


def check(run: Run, folder: Path) -> dict[str, str]:
    """One batch forward and backward, and what would happen; nothing is changed or written.

    Returns:
        What to show, by name.

    Raises:
        ValueError: The loss or its gradient is not finite.
    """
    probe(run)
    config, feed = run.config, run.feed
    batch, generator = feed.largest()
    run.sparsity.set_target()
    run.module.train()
    started = time.perf_counter()
    with run.accelerator.autocast():
        terms = run.objective(run.module, to_device(batch, run.accelerator.device), generator)
    run.accelerator.backward(terms["loss"])
    seconds = time.perf_counter() - started
    norm = float(
        torch.nn.utils.get_total_norm([p.grad for p in run.trained() if p.grad is not None])
    )
    run.optimizer.zero_grad(set_to_none=True)
    loss = float(terms["loss"].detach())
    if not (torch.isfinite(torch.tensor([loss, norm])).all()):
        raise ValueError(f"the first batch gives loss {loss} and gradient norm {norm}.")
    shapes, largest = feed.shapes(), tuple(batch["latents"].shape[1:])
    layers = run.sparsity.densities()
    trained = sum(p.numel() for p in run.trained())
    total = sum(p.numel() for p in run.bare.parameters())
    clips = config.data.batch * config.accumulation * feed.replicas
    unit = "pack" if config.data.pack else "clip"
    result = "LoRA weights" if config.lora.rank else "a pipeline"
    shown = {
        "model": f"{type(run.bare).__name__}, {trained:,} of {total:,} weights trained",
        "data": f"{len(feed.trained_on)} clips of {_count(len(shapes), 'grid')}, "
        f"{len(feed.held_out)} held out",
        "largest": f"{run.tokens(largest):,} tokens, latents {'x'.join(map(str, largest))}",
        "attention": _describe_attention(str(run.sparsity.schedule.algorithm), layers),
        "objective": ", ".join(
            f"{name} {float(term.detach()):.4g}" for name, term in terms.items()
        ),
        "gradient": f"norm {norm:.4g}, clipped to {config.optim.max_norm or 'nothing'}",
        "steps": f"{config.steps:,}, of {_count(clips, unit)} each",
        "time": f"{seconds:.2f} s for a batch of {len(batch['latents'])}, first call",
        "writes": f"checkpoints every {config.checkpoint.every} steps, then {result}, to {folder}",
    }
    if run.accelerator.device.type == "cuda":
        shown["memory"] = f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB at most"
    last = Trainer(run, folder).checkpoints.latest()
    if last:
        shown["resume"] = f"{last} is there; --resume goes on from it"
    return shown


def _describe_attention(algorithm: str, layers: list[float]) -> str:
    if not layers:
        return algorithm
    mean = sum(layers) / len(layers)
    return f"{algorithm}, density {mean:.3f} ({min(layers):.3f} to {max(layers):.3f} over layers)"


def _count(number: int, name: str) -> str:
    return f"{number} {name}" + ("s" if number > 1 else "")
