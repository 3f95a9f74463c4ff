"""A process that encodes, and may die in the middle of a file as `kill -9` would end it."""

import os
import signal
from pathlib import Path

from nabla_attn.generation.pipeline import load_pipeline
from nabla_attn.training.data.encode import EncodeRequest, encode
from nabla_attn.training.data.folder import FolderSource

REQUEST = EncodeRequest(shard_size=2)


def die_after(count: int) -> None:
    """Let the writing of one safetensors file stop half-way."""
    from safetensors import torch as safe

    save, left = safe.save_file, [count]

    def save_some(tensors, path, metadata=None):
        save(tensors, path, metadata)
        left[0] -= 1
        if left[0] == 0:
            os.truncate(path, Path(path).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    safe.save_file = save_some


def encode_and_die(model: Path, videos: Path, output: Path, count: int) -> None:
    """Encode; the process ends with the number of shards it made.

    Where `count` is not 0, it kills itself in the middle of the safetensors file of that number.
    """
    die_after(count)
    made = 99
    try:
        pipeline = load_pipeline(model, device="cpu", dtype="float32")
        made = encode(FolderSource(videos), lambda: pipeline, output, REQUEST).made
    finally:
        os._exit(made)
