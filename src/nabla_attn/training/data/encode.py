"""Videos and captions to latents and embeddings on disk, by any number of processes, resumable."""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from nabla_attn.files import read_json, write_text
from nabla_attn.training.data import store
from nabla_attn.training.data.clip import Source
from nabla_attn.training.data.encode_shard import EncodeRequest, Job, make_shard
from nabla_attn.training.families import family_of

VERSION = 1


@dataclass
class Summary:
    """What is in a folder, and what this process did.

    Attributes:
        encoded: videos in the shards that are done.
        skipped: how many were skipped there, by reason.
        shards: number of shards.
        made: shards made by this process.
        elsewhere: shards that other processes are at.
    """

    encoded: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    shards: int = 0
    made: int = 0
    elsewhere: int = 0


def encode(
    source: Source,
    pipeline: Any,
    folder: Path,
    request: EncodeRequest,
    tell: Callable[[int], None] = lambda count: None,
) -> Summary:
    """Encode what is not encoded yet and not being encoded by another process.

    Args:
        source: the clips.
        pipeline: encodes them.
        folder: where they go; may be shared by processes that ask for the same.
        request: sizes and rate.
        tell: called with a number of clips that are done, made here or found.

    Raises:
        ValueError: the model cannot be trained or cannot take a size, or the folder was begun with
            another source, model or request.
        OSError: the folder cannot be written.
    """
    family_of(pipeline)
    for size in request.sizes:
        size.check(pipeline)
    folder.mkdir(parents=True, exist_ok=True)
    job = Job(source, pipeline, folder, request, tell)
    _agree(job)
    summary = Summary(shards=job.shards)
    for shard in range(job.shards):
        start, stop = job.span(shard)
        if _is_done(folder, shard):
            tell(stop - start)
        else:
            summary.made += _take_shard(job, shard)
    _finish(job)
    for shard in range(job.shards):
        if not _is_done(folder, shard):
            summary.elsewhere += 1
            continue
        found = read_json(store.shard_path(folder, shard).with_suffix(".json"))
        summary.encoded += len(found["videos"])
        summary.skipped.update(line["kind"] for line in found["skipped"])
    return summary


def _agree(job: Job) -> None:
    """Write what is asked for, or see that it is what the folder was begun with."""
    request = job.request
    wanted = {
        "version": VERSION,
        "pipeline": family_of(job.pipeline).pipeline,
        "model": _fingerprint(job.pipeline),
        "source": job.source.identity(),
        "sizes": [asdict(size) for size in request.sizes],
        "fps": request.fps,
        "shard_size": request.shard_size,
        "shards": job.shards,
    }
    path = job.folder / store.ENCODING
    with FileLock(job.folder / ".encoding.lock"):
        if not path.exists():
            names = [entry.name for entry in job.folder.iterdir()]
            others = [name for name in names if not name.startswith(".")]
            if others:
                raise ValueError(
                    f"{job.folder} is not empty: it has {others[0]}. Choose a new folder."
                )
            store.write_json(path, wanted)
    found = read_json(path)
    found = found if isinstance(found, dict) else {}
    differing = [name for name, value in wanted.items() if found.get(name) != value]
    if differing:
        raise ValueError(
            f"{job.folder} was begun with another {', '.join(differing)}. Choose a new folder, or "
            "ask for the same to go on."
        )


def _take_shard(job: Job, shard: int) -> bool:
    """Whether this process made a shard, and no other had it or is at it."""
    path = job.folder / f".shard-{shard:05d}.lock"
    # The system frees a lock when its process ends, however it ends: a killed run goes on at once.
    try:
        with FileLock(path, blocking=False):
            if _is_done(job.folder, shard):
                return False
            for leftover in job.folder.glob(f".shard-{shard:05d}.*.tmp"):
                leftover.unlink(missing_ok=True)
            make_shard(job, shard)
            return True
    except Timeout:
        return False
    finally:
        # Who still opens it finds the shard done; before that, removing it would let two work.
        if _is_done(job.folder, shard):
            path.unlink(missing_ok=True)


def _is_done(folder: Path, shard: int) -> bool:
    path = store.shard_path(folder, shard)
    return path.is_file() and path.with_suffix(".json").is_file()


def _finish(job: Job) -> None:
    """Write the index once all shards are done."""
    folder, shards = job.folder, range(job.shards)
    with FileLock(folder / ".encoding.lock"):
        if (folder / store.INDEX).exists() or not all(_is_done(folder, n) for n in shards):
            return
        # What killed processes were writing.
        for leftover in folder.rglob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        lists = [read_json(store.shard_path(folder, n).with_suffix(".json")) for n in shards]
        skipped = [line for entry in lists for line in entry["skipped"]]
        write_text(folder / store.SKIPPED, store.to_lines(skipped))
        videos = [video for entry in lists for video in entry["videos"]]
        store.write_json(folder / store.INDEX, {"videos": videos, "num_skipped": len(skipped)})


def _fingerprint(pipeline: Any) -> str:
    """Hash of the beginning of every weight of the parts that encode."""
    total = hashlib.sha256()
    for name, part in sorted(pipeline.components.items()):
        if not isinstance(part, torch.nn.Module) or name.startswith("transformer"):
            continue
        for key, value in part.state_dict().items():
            total.update(f"{name}.{key} {list(value.shape)} {value.dtype}\n".encode())
            total.update(value.flatten()[:256].detach().float().cpu().numpy().tobytes())
    return total.hexdigest()
