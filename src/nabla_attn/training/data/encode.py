"""Videos and captions to latents and embeddings on disk, by any number of processes, resumable."""

import hashlib
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from nabla_attn.errors import first_line
from nabla_attn.files import is_whole, read_object, write_text
from nabla_attn.generation.memory import check_encoding
from nabla_attn.generation.request import GenerationRequest
from nabla_attn.generation.text import watch_texts
from nabla_attn.progress import ProgressCallback, ignore_progress
from nabla_attn.training.data import encoded
from nabla_attn.training.data.clip import Clip, ClipSource, Skipped, read_clip
from nabla_attn.training.data.resize import Size, choose_size, fit
from nabla_attn.training.encoders import encode_caption, encode_first_frame, encode_video
from nabla_attn.training.families import Conditions, check_size, family_of
from nabla_attn.work_sharing import SharedWork, share_work

VERSION = 1


@dataclass(frozen=True)
class EncodeRequest:
    """How videos are encoded.

    Attributes:
        sizes: Sizes that videos may be brought to.
        fps: The rate to bring them to; None keeps their own.
        shard_size: Number of clips in a shard, the unit that a process takes and that a kill costs.
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


@dataclass
class EncodeSummary:
    """What is in a folder, and what this process did.

    Attributes:
        encoded: Number of videos in the shards that are done.
        skipped: How many were skipped there, by reason.
        cut: Number of encoded videos whose caption the text encoder did not read to its end.
        shards: Number of shards.
        made: Number of shards made by this command.
        elsewhere: Number of shards that other processes are at.
    """

    encoded: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    shards: int = 0
    made: int = 0
    elsewhere: int = 0


def encode(
    source: ClipSource,
    load: Callable[[], Any],
    folder: Path,
    request: EncodeRequest,
    *,
    engine: str = "locks",
    workers: int | None = None,
    has_gpus: bool = True,
    on_progress: ProgressCallback = ignore_progress,
) -> EncodeSummary:
    """Encode what is not encoded yet and not being encoded by another process.

    Args:
        source: The clips.
        load: Loads the pipeline that encodes them; called once in each process that works.
        folder: The folder to write; processes that ask for the same may share it.
        request: Sizes and rate.
        engine: How processes share the work, see `share_work`.
        workers: Number of Ray's workers.
        has_gpus: Whether Ray's workers take a GPU each.
        on_progress: Called with the number of clips that are done, made here or found.

    Raises:
        ValueError: The model cannot be trained or cannot take a size, or the folder was begun with
            another source, model or request.
        OSError: The folder cannot be written.
    """
    spans = {
        _shard_name(index): range(start, min(start + request.shard_size, len(source)))
        for index, start in enumerate(range(0, len(source), request.shard_size))
    }
    is_done = partial(_is_done, folder)
    done = sum(len(span) for name, span in spans.items() if is_done(name))
    on_progress("encode", done, len(source))

    def count(clips: int) -> None:
        nonlocal done
        done += clips
        on_progress("encode", done, len(source))

    # Clip by clip in this process; Ray's workers report whole shards.
    counts = ignore_clip if engine == "ray" else count
    start = partial(_Encoder.start, source, load, folder, request, counts)
    if all(map(is_done, spans)):
        start()  # A finished folder, too, must be one of the same request.
    shared = share_work(
        SharedWork(folder, list(spans), start, is_done),
        engine,
        workers=workers,
        has_gpus=has_gpus,
        on_item=lambda name, _: count(len(spans[name])) if engine == "ray" else None,
    )
    _finish(folder, list(spans))
    summary = EncodeSummary(
        shards=len(spans), made=len(shared.made), elsewhere=len(shared.elsewhere)
    )
    for name in filter(is_done, spans):
        found = encoded.read_shard(folder, name)
        summary.encoded += len(found["videos"])
        summary.cut += found.get("num_cut", 0)
        summary.skipped.update(line["kind"] for line in found["skipped"])
    return summary


def ignore_clip(count: int) -> None:
    """Called with clips that are done where nobody wants to know."""


class _Encoder:
    """Encodes shards in one process.

    Args:
        source: The clips.
        pipeline: Encodes them.
        folder: Where they go.
        request: Sizes and rate.
        on_clips: Called with a number of clips that are done.
    """

    def __init__(
        self,
        source: ClipSource,
        pipeline: Any,
        folder: Path,
        request: EncodeRequest,
        on_clips: Callable[[int], None],
    ) -> None:
        self._source, self._pipeline = source, pipeline
        self._folder, self._request = folder, request
        self._on_clips = on_clips
        self._has_warned = False
        self._fitting: set[tuple[int, ...]] = set()

    @classmethod
    def start(
        cls,
        source: ClipSource,
        load: Callable[[], Any],
        folder: Path,
        request: EncodeRequest,
        on_clips: Callable[[int], None],
    ) -> Callable[[str], None]:
        """Load the pipeline and check that it is the folder's; what encodes the shard of a name."""
        pipeline = load()
        family_of(pipeline)
        for size in request.sizes:
            size.check(pipeline)
            if size.frames and size.height and size.width:
                check_encoding(pipeline, size.frames, size.height, size.width)
        folder.mkdir(parents=True, exist_ok=True)
        _agree(source, pipeline, folder, request)
        return cls(source, pipeline, folder, request, on_clips).make_shard

    def make_shard(self, name: str) -> None:
        """Encode the clips of a shard; its list is written last."""
        shard, size = int(name.rpartition("-")[2]), self._request.shard_size
        latents: dict[str, Tensor] = {}
        videos: list[dict[str, Any]] = []
        skipped: list[dict[str, str]] = []
        num_cut = 0
        for clip in self._source.read(shard * size, (shard + 1) * size):
            try:
                found, shape = self._encode_clip(clip)
            except Skipped as reason:
                skipped.append({"name": clip.name, "kind": reason.kind, "reason": str(reason)})
            else:
                place = len(videos)
                entry = encoded.EncodedVideo(
                    name=clip.name,
                    caption=clip.caption,
                    shard=shard,
                    place=place,
                    shape=tuple(found[""].shape),
                    size=shape,
                )
                for condition, value in found.items():
                    latents[encoded.tensor_key(place, condition)] = value
                videos.append(asdict(entry))
                num_cut += self._is_cut(clip.caption)
            self._on_clips(1)
        path = encoded.shard_path(self._folder, shard)
        encoded.save_tensors(latents, path)
        done = {"videos": videos, "skipped": skipped, "num_cut": num_cut}
        encoded.write_json(path.with_suffix(".json"), done)

    def _encode_clip(self, clip: Clip) -> tuple[Conditions, tuple[int, int, int]]:
        """The latents under "", the conditions of the first frame, and the size in pixels.

        Raises:
            Skipped: The clip cannot be used.
        """
        video = self._prepare(clip)
        frames, height, width = video.shape[:3]
        try:
            by_image = self._keep_conditions(clip.caption, video)
            latents = encode_video(self._pipeline, video)
        except (ValueError, MemoryError, torch.OutOfMemoryError) as error:
            raise Skipped("cannot be encoded", first_line(error)) from error
        # Half the size, and closer than bfloat16: latents are of order 1.
        found = {name: value.half() for name, value in {"": latents, **by_image}.items()}
        if not all(value.isfinite().all() for value in found.values()):
            raise Skipped("cannot be encoded", "its latents overflowed. Use --dtype float32")
        return found, (frames, height, width)

    def _is_cut(self, caption: str) -> bool:
        """Whether the text encoder did not read a caption to its end; warns of the first one."""
        noted = encoded.read_metadata(encoded.caption_path(self._folder, caption))
        is_cut = noted.get("is_cut") == "True"
        if is_cut and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"the text encoder does not read captions this long to the end: {caption[:40]}... "
                "The summary counts them.",
                stacklevel=2,
            )
        return is_cut

    def _prepare(self, clip: Clip) -> np.ndarray:
        """Frames at the size to encode.

        Raises:
            Skipped: The clip cannot be used.
        """
        sizes = self._request.sizes
        counts = [size.frames for size in sizes if size.frames is not None]
        most = max(counts) if len(counts) == len(sizes) else None
        video = read_clip(clip, most, self._request.fps)
        frames, height, width = video.shape[:3]
        video = fit(video, choose_size(sizes, frames, height, width))
        try:
            check_size(self._pipeline, *video.shape[:3])
        except ValueError as error:
            raise Skipped("odd size", str(error)) from error
        self._check_memory(video.shape[:3])
        return video

    def _check_memory(self, shape: tuple[int, ...]) -> None:
        if shape in self._fitting:
            return
        try:
            check_encoding(self._pipeline, *shape)
        except ValueError as error:
            raise Skipped("too large", str(error)) from error
        self._fitting.add(shape)

    def _keep_conditions(self, caption: str, video: np.ndarray) -> Conditions:
        """Write the conditions of a caption, of the empty one, and of the size, where missing.

        Returns:
            Those of the first frame, from the same run of the pipeline where there is one.
        """
        frames, height, width = video.shape[:3]
        grid = encoded.grid_path(self._folder, (frames, height, width))
        family = family_of(self._pipeline)
        by_image: Conditions = {}
        for text in dict.fromkeys((caption, "")):
            path = encoded.caption_path(self._folder, text)
            if is_whole(path) and is_whole(grid):
                continue
            # Counted instead, as there may be thousands.
            with (
                warnings.catch_warnings(action="ignore"),
                watch_texts(self._pipeline, GenerationRequest(text)) as cut,
            ):
                found = encode_caption(
                    self._pipeline, text, frames=frames, height=height, width=width, image=video[0]
                )
            by_image = {name: found.pop(name) for name in family.by_image if name in found}
            by_grid = {name: found.pop(name) for name in [*found] if family.is_by_grid(name)}
            if not is_whole(path):
                encoded.save_tensors(found, path, {"is_cut": str(bool(cut))})
            if not is_whole(grid):
                encoded.save_tensors(by_grid, grid)
        return by_image or encode_first_frame(self._pipeline, video)


def _agree(source: ClipSource, pipeline: Any, folder: Path, request: EncodeRequest) -> None:
    """Write what is asked for, or check that it is what the folder was begun with."""
    wanted = {
        "version": VERSION,
        "pipeline": family_of(pipeline).pipeline,
        "model": _fingerprint(pipeline),
        "source": source.identity(),
        "sizes": [asdict(size) for size in request.sizes],
        "fps": request.fps,
        "shard_size": request.shard_size,
        "shards": -(-len(source) // request.shard_size),
    }
    path = folder / encoded.ENCODING
    with FileLock(folder / ".encoding.lock"):
        if not is_whole(path):
            names = [entry.name for entry in folder.iterdir() if entry != path]
            others = [name for name in names if not name.startswith(".")]
            if others:
                raise ValueError(f"{folder} is not empty: it has {others[0]}. Choose a new folder.")
            encoded.write_json(path, wanted)
    found = read_object(path)
    differing = [name for name, value in wanted.items() if found.get(name) != value]
    if differing:
        raise ValueError(
            f"{folder} was begun with another {', '.join(differing)}. Choose a new folder, or ask "
            "for the same to continue."
        )


def _shard_name(shard: int) -> str:
    return encoded.shard_path(Path(), shard).stem


def _is_done(folder: Path, name: str) -> bool:
    return all(is_whole(folder / f"{name}{suffix}") for suffix in (".json", ".safetensors"))


def _finish(folder: Path, names: list[str]) -> None:
    """Write the index once all shards are done."""
    with FileLock(folder / ".encoding.lock"):
        if is_whole(folder / encoded.INDEX) or not all(_is_done(folder, name) for name in names):
            return
        # What killed processes were writing.
        for leftover in folder.rglob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        lists = [encoded.read_shard(folder, name) for name in names]
        skipped = [line for entry in lists for line in entry["skipped"]]
        write_text(folder / encoded.SKIPPED, encoded.to_lines(skipped))
        videos = [video for entry in lists for video in entry["videos"]]
        encoded.write_json(folder / encoded.INDEX, {"videos": videos, "num_skipped": len(skipped)})


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
