"""The tensors of a run, to a checkpoint and back: the same files for any number of processes.

Process 0 writes whole tensors, so FSDP and a single process read each other's checkpoints.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nabla_attn.distributed import reshard
from nabla_attn.models import is_method_part
from nabla_attn.training.checkpoint import read_state
from nabla_attn.training.setup import TrainRun

_MODEL, _AVERAGE = "model.safetensors", "average.safetensors"
_OPTIMIZER, _RANDOM = "optimizer.pt", "random.pt"


def collect(run: TrainRun) -> Callable[[Path], None]:
    """Gather a run's tensors from all processes.

    Returns:
        A function that writes them into a folder, for one process to call.
    """
    from accelerate.utils import gather_object
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
    )

    options = _options()
    reshard(run.module)
    model: dict[str, Any] = get_model_state_dict(run.module, options=options)
    inner = _inner(run.optimizer)
    # Before the first update there is nothing to keep, and torch would invent an update.
    optimizer: dict[str, Any] = {}
    if inner.state:
        optimizer = get_optimizer_state_dict(run.module, inner, options=options)
    average = _average_tensors(run)
    randoms = gather_object([_random_state()])

    def write(folder: Path) -> None:
        save_file({name: _own(value) for name, value in model.items()}, folder / _MODEL)
        torch.save(optimizer, folder / _OPTIMIZER)
        torch.save(randoms, folder / _RANDOM)
        if average is not None:
            save_file(average, folder / _AVERAGE)

    return write


def restore(run: TrainRun, folder: Path) -> None:
    """Bring a run back to a checkpoint, on every process.

    Raises:
        ValueError: A file is missing or damaged, or holds other weights than the run trains.
    """
    from torch.distributed.checkpoint.state_dict import set_model_state_dict

    options = _options()
    try:
        model: dict[str, Any] = dict(load_file(folder / _MODEL))
        optimizer = torch.load(folder / _OPTIMIZER, weights_only=True, map_location="cpu")
        randoms = torch.load(folder / _RANDOM, weights_only=True, map_location="cpu")
        average = load_file(folder / _AVERAGE) if _has_average(run, folder) else None
    except Exception as error:
        raise ValueError(f"{folder}: damaged checkpoint ({error}). Remove it.") from error
    _check_names(run, model, folder)
    reshard(run.module)
    set_model_state_dict(run.module, model, options=options)
    if optimizer:
        _restore_optimizer(run, optimizer)
    if average is not None:
        _restore_average(run, average)
    elif run.average is not None:
        _start_average(run)
    _restore_random(randoms[run.accelerator.process_index % len(randoms)])


def _check_names(run: TrainRun, model: dict[str, Tensor], folder: Path) -> None:
    """Check that a checkpoint has the weights that are trained; loading would not notice."""
    found = {name: tuple(value.shape) for name, value in model.items()}
    for name, parameter in run.bare.named_parameters():
        if parameter.requires_grad and found.get(name) != tuple(parameter.shape):
            raise ValueError(
                f"{folder} holds other weights than are trained now: {name} is "
                f"{found.get(name, 'not there')}, not {tuple(parameter.shape)}. Continue with the "
                "same model and lora settings, or choose another --output."
            )


def _restore_optimizer(run: TrainRun, state: dict[str, Any]) -> None:
    """Bring back the running averages; the settings are those of the configuration."""
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    inner = _inner(run.optimizer)
    (settings,) = ({k: v for k, v in g.items() if k != "params"} for g in inner.param_groups)
    set_optimizer_state_dict(run.module, inner, state, options=_options())
    for group in inner.param_groups:
        group.update(settings)


def whole_weights(run: TrainRun) -> dict[str, Tensor]:
    """Weights on the CPU, gathered on process 0; trained parts of methods among them.

    With LoRA the others are the adapters, as PEFT names them; with `parts_only` there are none.
    """
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    reshard(run.module)
    has_adapters = bool(run.config.lora.rank)
    options = _options(ignore_frozen_params=has_adapters or run.config.sparsity.parts_only)
    weights: dict[str, Any] = get_model_state_dict(run.module, options=options)
    if has_adapters:
        from peft import get_peft_model_state_dict

        parts = {name: value for name, value in weights.items() if is_method_part(name)}
        weights = get_peft_model_state_dict(run.bare, state_dict=weights) | parts
    return {name: _own(value) for name, value in weights.items()}


def _options(*, ignore_frozen_params: bool = True) -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(
        full_state_dict=True,
        cpu_offload=True,
        ignore_frozen_params=ignore_frozen_params,
        strict=False,
    )


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """The optimiser inside accelerate's wrapper."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def _own(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous()


def _average_tensors(run: TrainRun) -> dict[str, Tensor] | None:
    if run.average is None:
        return None
    tensors = {str(i): _own(whole_tensor(p)) for i, p in enumerate(run.average.shadow_params)}
    return tensors | {"step": torch.tensor(run.average.optimization_step)}


def _has_average(run: TrainRun, folder: Path) -> bool:
    """Whether a run wants an average and the run that wrote the checkpoint had one."""
    return run.average is not None and bool(read_state(folder)["config"]["ema"])


def _start_average(run: TrainRun) -> None:
    """Start a new average from the weights."""
    for shadow, weight in zip(run.average.shadow_params, run.trained(), strict=True):
        shadow.copy_(weight.detach())


def _restore_average(run: TrainRun, tensors: dict[str, Tensor]) -> None:
    run.average.optimization_step = int(tensors.pop("step"))
    for place, shadow in enumerate(run.average.shadow_params):
        value = tensors[str(place)].to(shadow.device)
        if hasattr(shadow, "placements"):
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(value, shadow.device_mesh, shadow.placements)
        shadow.copy_(value)


def whole_tensor(value: Any) -> Tensor:
    """The whole of a tensor that FSDP has sharded; any other tensor as it is."""
    whole: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole


def _random_state() -> dict[str, Any]:
    state = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
