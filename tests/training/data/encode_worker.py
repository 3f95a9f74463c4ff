"""Processes that encode: `encode_worker.py MODEL VIDEOS`, then lines "OUTPUT DIE_AFTER" on stdin.

A line forks a process, so that libraries are imported once. Where DIE_AFTER is not 0, the process
kills itself in the middle of safetensors file number DIE_AFTER, as `kill -9` would. An empty line
waits for all, and writes how they ended."""

import os
import signal
import sys
from pathlib import Path

import torch

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


def work(pipeline, videos: str, output: str, count: int) -> None:
    """Encode in a process of its own, which ends with the number of shards it made."""
    die_after(count)
    summary = encode(FolderSource(Path(videos)), lambda: pipeline, Path(output), REQUEST)
    os._exit(summary.made)


def main(model: str, videos: str) -> None:
    """Fork until stdin ends."""
    torch.set_num_threads(1)
    pipeline = load_pipeline(model, device="cpu", dtype="float32")
    children = []
    for line in sys.stdin:
        if line.strip():
            output, count = line.split()
            child = os.fork()
            if not child:
                try:
                    work(pipeline, videos, output, int(count))
                finally:
                    os._exit(99)
            children.append(child)
        else:
            codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
            sys.stdout.write(" ".join(map(str, codes)) + "\n")
            sys.stdout.flush()
            children.clear()


if __name__ == "__main__":
    main(*sys.argv[1:])
