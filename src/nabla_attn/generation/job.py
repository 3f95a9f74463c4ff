"""One video as files, made by one process or several: mp4, record, and block maps if asked for."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from nabla_attn import distributed
from nabla_attn.distributed import is_first_process
from nabla_attn.files import check_writable
from nabla_attn.generation.generate import generate
from nabla_attn.generation.map_recorder import MapRecorder
from nabla_attn.generation.placement import resolve_device
from nabla_attn.generation.request import GenerationRequest
from nabla_attn.generation.video import write_video
from nabla_attn.media import read_image
from nabla_attn.models import find_row
from nabla_attn.progress import ProgressCallback, ignore_progress
from nabla_attn.record import RunRecord
from nabla_attn.sizes import denoisers

if TYPE_CHECKING:
    from PIL.Image import Image

MAPS = ".maps.safetensors"
"""The ending of recorded maps, in the place of the video's `.mp4`."""


@dataclass(frozen=True, kw_only=True)
class VideoJob:
    """A video to make and where it goes; everything is checked before a model is loaded.

    Attributes:
        request: The video to make.
        output: The mp4; the record and the maps have the same name with other endings.
        fps: Frames per second.
        image: The first frame, for image-to-video pipelines; of the video's size.
        last_image: The last frame, for models of both; of the video's size.
        maps: "steps", "layers" and "heads" to record, each a tuple or None for what fits; None
            records nothing.

    Raises:
        ValueError: The output is no mp4 or cannot be written, an image cannot be read or has
            another size, there is a last one alone, or dense attention is to be recorded.
    """

    request: GenerationRequest
    output: Path
    fps: float
    image: Path | None = None
    last_image: Path | None = None
    maps: Mapping[str, tuple[int, ...] | None] | None = None

    def __post_init__(self) -> None:
        if self.output.suffix.lower() != ".mp4":
            raise ValueError(f"the output must be an .mp4 file, got {self.output}.")
        if self.maps is not None and self.request.is_dense:
            raise ValueError("dense attention has no maps to record. Pass --sparse-algo nabla-0.7.")
        check_writable(self.output)
        self._check_frames()

    @cached_property
    def given_frames(self) -> "dict[str, Image]":
        """The given frames as they are seen, by the argument of the pipeline's call."""
        paths = {"image": self.image, "last_image": self.last_image}
        return {name: read_image(path) for name, path in paths.items() if path is not None}

    def run(
        self, pipeline: Any, *, on_progress: ProgressCallback = ignore_progress
    ) -> RunRecord | None:
        """Make the video and write its files; the first of several processes writes.

        Args:
            pipeline: A pipeline of diffusers.
            on_progress: Called at every stage and step.

        Returns:
            The record; None on the other processes.
        """
        recorder = None
        if self.maps is not None:
            asked: dict[str, Any] = dict(self.maps)
            recorder = MapRecorder(pipeline, self.request, **asked)
        frames, record = generate(
            pipeline,
            self.request,
            on_progress=on_progress,
            inputs=dict(self.given_frames),
            on_apply=recorder.attach if recorder else None,
        )
        if not is_first_process():
            return None
        digests = {
            f"{name}_sha256": hashlib.sha256(frame.tobytes()).hexdigest()
            for name, frame in self.given_frames.items()
        }
        record = replace(record, config=record.config | digests)
        write_video(frames, self.output, self.fps)
        maps_file = self.output.with_suffix(MAPS)
        # Those of an earlier run under this name would pass for this one's.
        maps_file.unlink(missing_ok=True)
        if recorder:
            recorder.result().save(maps_file)
            record = recorder.note_in(record)
        record.save(self.output.with_suffix(".json"))
        return record

    def _check_frames(self) -> None:
        request = self.request
        if self.last_image is not None and self.image is None:
            raise ValueError("--last-image needs the first frame too. Add --image FIRST_FRAME.png.")
        for name, image in self.given_frames.items():
            if image.size != (request.width, request.height):
                raise ValueError(
                    f"{getattr(self, name)} has {image.width}x{image.height} pixels and the video "
                    f"{request.width}x{request.height}. Scale or crop it, or pass --width "
                    f"{image.width} --height {image.height}."
                )


@contextmanager
def shared_pipeline(load: Callable[[str], Any], device: str, *, has_maps: bool) -> Iterator[Any]:
    """Yield a pipeline; under torchrun, one whose transformers share each video, head-wise.

    Args:
        load: Loads the pipeline on a device.
        device: A torch device or `"auto"`.
        has_maps: Whether block maps are recorded.

    Raises:
        ValueError: The processes have no GPU each, maps are recorded, or heads do not split.
    """
    processes = distributed.num_processes()
    if processes == 1:
        yield load(device)
        return
    place = distributed.local_device(resolve_device(device))
    gpus, here = torch.accelerator.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if gpus < here or (place.type == "cpu" and torch.cuda.is_available()):
        raise ValueError(
            f"{processes} processes share one video through diffusers, which needs a GPU for each: "
            f"this machine has {gpus}, and --device is {device}. Start one process, or pass "
            "--prompts FILE to make a video in each."
        )
    if has_maps:
        raise ValueError("maps are recorded in one process, which has all heads. Drop torchrun.")
    pipeline = load(str(place))
    try:
        distributed.join_process_group(place)
        for model in denoisers(pipeline):
            row = find_row(model)
            plan = row.cp_plan(model) if row is not None and row.cp_plan else None
            distributed.split_sequence(model, ulysses_size=processes, plan=plan)
        yield pipeline
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
