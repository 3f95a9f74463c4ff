"""Pipelines as verbs load them: under a spinner, with the libraries' warnings shown as ours."""

import logging
import os
import warnings
from collections.abc import Sequence
from textwrap import shorten
from typing import Any

from nabla_attn.cli.output import HARMLESS

MAX_MESSAGE = 400  # characters of a library's warning


def load_quietly(
    model: str, device: str, dtype: str, lora: Sequence[str] = (), **options: Any
) -> Any:
    """Load a pipeline under a spinner, without the libraries' own bars; see `load_pipeline`."""
    from rich.console import Console

    with Console(stderr=True).status(f"loading {model}"):
        quiet_libraries()
        from nabla_attn.generation.pipeline import load_pipeline

        return load_pipeline(model, device=device, dtype=dtype, lora=lora, **options)


def load_on_own_device(
    model: str, device: str, dtype: str, lora: Sequence[str] = (), **options: Any
) -> Any:
    """Load a pipeline on the device of this process among several."""
    import torch

    from nabla_attn.distributed import local_device
    from nabla_attn.generation.placement import resolve_device

    place = local_device(resolve_device(device))
    if place.type == "cuda":
        torch.cuda.set_device(place)
    return load_quietly(model, str(place), dtype, lora, **options)


class LibraryWarnings(logging.Handler):
    """Hands warnings in the logs of libraries on to `warnings`, which shows them as ours."""

    def emit(self, record: logging.LogRecord) -> None:
        """Warn of a record; texts of several lines become one."""
        message = record.getMessage()
        if not message.startswith(HARMLESS):
            warnings.warn(shorten(message, MAX_MESSAGE), stacklevel=1)


def quiet_libraries() -> None:
    """Turn off the bars of diffusers and transformers, and show their warnings as our own."""
    # Both are slow to load and read this when they are.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        log = library.utils.logging
        log.disable_progress_bar()
        log.set_verbosity_warning()
        root = logging.getLogger(library.__name__)
        root.handlers = [LibraryWarnings(level=logging.WARNING)]
        root.propagate = False
