"""One shard: its clips to latents, their captions to conditions."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from nabla_attn.training.data import store
from nabla_attn.training.data.clip import Clip, Skipped, Source
from nabla_attn.training.data.decode import read_clip
from nabla_attn.training.data.sizes import Size, choose_size, fit
from nabla_attn.training.encoders import encode_caption, encode_first_frame, encode_video
from nabla_attn.training.families import check_size, family_of
from nabla_attn.training.family import Conditions


@dataclass(frozen=True)
class EncodeRequest:
    """How videos are encoded.

    Attributes:
        sizes: what videos may be brought to.
        fps: rate to bring them to; None keeps their own.
        shard_size: clips of a shard, the unit that a process takes and that a kill can cost.
    """

    sizes: tuple[Size, ...] = (Size(),)
    fps: float | None = None
    shard_size: int = 64

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise ValueError(f"shard_size must be at least 1, got {self.shard_size}.")
        if self.fps is not None and not 0 < self.fps <= 1000:
            raise ValueError(f"fps must be above 0 and at most 1000, got {self.fps}.")
        if not self.sizes:
            raise ValueError("at least one size is needed.")


@dataclass(frozen=True)
class Job:
    """What the processes of one folder do.

    Attributes:
        source: the clips.
        pipeline: encodes them.
        folder: where they go.
        request: sizes and rate.
        tell: called with a number of clips that are done.
    """

    source: Source
    pipeline: Any
    folder: Path
    request: EncodeRequest
    tell: Callable[[int], None]

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-len(self.source) // self.request.shard_size)

    def span(self, shard: int) -> tuple[int, int]:
        """First clip of a shard, and the one after its last."""
        start = shard * self.request.shard_size
        return start, min(start + self.request.shard_size, len(self.source))


def make_shard(job: Job, shard: int) -> None:
    """Encode the clips of a shard; its list is written last.

    Args:
        job: of the folder.
        shard: its number.
    """
    latents: dict[str, Tensor] = {}
    videos: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    for clip in job.source.read(*job.span(shard)):
        try:
            video = _prepare(clip, job)
        except Skipped as reason:
            skipped.append({"name": clip.name, "kind": reason.kind, "reason": str(reason)})
        else:
            frames, height, width = video.shape[:3]
            by_image = _keep_conditions(job, clip.caption, video)
            # Half the size, and closer than bfloat16: latents are of order 1.
            encoded = encode_video(job.pipeline, video).half()
            entry = store.Entry(
                name=clip.name,
                caption=clip.caption,
                shard=shard,
                place=len(videos),
                shape=tuple(encoded.shape),
                size=(frames, height, width),
            )
            latents[str(entry.place)] = encoded
            for condition, value in by_image.items():
                latents[store.image_key(entry.place, condition)] = value.half()
            videos.append(asdict(entry))
        job.tell(1)
    path = store.shard_path(job.folder, shard)
    store.save_tensors(latents, path)
    store.write_json(path.with_suffix(".json"), {"videos": videos, "skipped": skipped})


def _prepare(clip: Clip, job: Job) -> np.ndarray:
    """Frames at the size to encode.

    Raises:
        Skipped: the clip cannot be used.
    """
    sizes = job.request.sizes
    counts = [size.frames for size in sizes if size.frames is not None]
    most = max(counts) if len(counts) == len(sizes) else None
    video = read_clip(clip, most, job.request.fps)
    frames, height, width = video.shape[:3]
    video = fit(video, choose_size(sizes, frames, height, width))
    try:
        check_size(job.pipeline, *video.shape[:3])
    except ValueError as error:
        raise Skipped("odd size", str(error)) from error
    return video


def _keep_conditions(job: Job, caption: str, video: np.ndarray) -> Conditions:
    """Write the conditions of a caption, of the empty one, and of the size, where missing.

    Returns:
        Those of the first frame, from the same run of the pipeline where there is one.
    """
    frames, height, width = video.shape[:3]
    grid = store.grid_path(job.folder, (frames, height, width))
    family = family_of(job.pipeline)
    by_image: Conditions = {}
    for text in dict.fromkeys((caption, "")):
        path = store.caption_path(job.folder, text)
        if path.exists() and grid.exists():
            continue
        found = encode_caption(
            job.pipeline, text, frames=frames, height=height, width=width, image=video[0]
        )
        by_image = {name: found.pop(name) for name in family.by_image if name in found}
        by_grid = {name: found.pop(name) for name in [*found] if family.is_by_grid(name)}
        if not path.exists():
            store.save_tensors(found, path)
        if not grid.exists():
            store.save_tensors(by_grid, grid)
    return by_image or encode_first_frame(job.pipeline, video)
