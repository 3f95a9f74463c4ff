"""Fill a planned model with its weights, one tensor at a time."""

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nabla_attn.progress import ProgressCallback, ignore_progress
from nabla_attn.wan.plan import PartPlan, plan_part
from nabla_attn.wan.tensor_files import open_tensor_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from nabla_attn.wan.layout import TransformerFiles


def stored_or(plan: PartPlan, name: str, dtype: torch.dtype | None) -> torch.dtype:
    """The type to keep parameter ``name`` in.

    Args:
        plan: the part.
        name: of the parameter.
        dtype: what was asked for; None is the stored type, with float8 widened to bfloat16.
            In half precision the modules that diffusers and transformers keep in float32 stay so;
            transformers does it in float16 alone.
    """
    halves = (torch.float16,) if plan.kind.config_class else (torch.float16, torch.bfloat16)
    if dtype in halves:
        kept = getattr(plan.model, "_keep_in_fp32_modules", None) or ()
        if any(part in name.split(".") for part in kept):
            return torch.float32
    source = plan.sources[name]
    stored = source.file.infos[source.name].dtype
    assert stored is not None
    return dtype or (stored if stored.itemsize > 1 else torch.bfloat16)


def fill(
    plan: PartPlan, dtype: torch.dtype | None, progress: ProgressCallback = ignore_progress
) -> "nn.Module":
    """Put the weights of ``plan`` into its model; the peak is the model and one tensor more.

    Args:
        plan: from ``plan_part``, its files still open.
        dtype: of the parameters; None keeps the stored types (float8 becomes bfloat16).
        progress: told of every tensor.
    """
    from accelerate.utils import set_module_tensor_to_device

    model: Any = plan.model
    state = model.state_dict()
    for done, (name, source) in enumerate(plan.sources.items(), start=1):
        kept = stored_or(plan, name, dtype)
        value = source.read(state[name].shape, kept)
        set_module_tensor_to_device(model, name, "cpu", value=value, dtype=value.dtype)
        progress(f"loading {plan.kind.component}", done, len(plan.sources))
    if plan.kind.ties:
        model.tie_weights()
    return model.eval().requires_grad_(False)


@contextmanager
def open_part(kind_name: str, path: str | Path, *config_args: Any) -> "Iterator[PartPlan]":
    """Open and check the one file of a VAE, text encoder or image encoder."""
    with open_tensor_file(path) as file:
        yield plan_part(kind_name, [file], *config_args)


@contextmanager
def open_transformer(files: "TransformerFiles") -> "Iterator[PartPlan]":
    """Open and check the shards of one transformer."""
    with files.open() as opened:
        yield plan_part("transformer", opened, files.config)


def load_part(
    kind_name: str,
    path: str | Path,
    *config_args: Any,
    dtype: torch.dtype | None = None,
    progress: ProgressCallback = ignore_progress,
) -> "nn.Module":
    """Load a VAE, text encoder or image encoder from its original file.

    Args:
        kind_name: ``"VAE"``, ``"Wan 2.2 VAE"``, ``"text encoder"`` or ``"image encoder"``.
        path: the file.
        config_args: for the image encoder, its number of heads if they are not 80 wide.
        dtype: of the parameters; None as stored.
        progress: told of every tensor.
    """
    with open_part(kind_name, path, *config_args) as plan:
        return fill(plan, dtype, progress)


def vae_kind(path: Path) -> str:
    """The kind of VAE that a file name promises; its contents are checked against it."""
    return "Wan 2.2 VAE" if path.name.startswith("Wan2.2") else "VAE"
