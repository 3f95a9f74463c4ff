"""Generating the dense and the sparse video of one request in a thread that can be stopped."""

import queue
import threading
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np

from nabla_attn.generation.generate import generate, warm_up
from nabla_attn.generation.map_file import RecordedMaps
from nabla_attn.generation.map_recorder import MapRecorder
from nabla_attn.generation.request import GenerationRequest
from nabla_attn.progress import ProgressCallback
from nabla_attn.record import RunRecord


@dataclass(frozen=True)
class Step:
    """How far a video is.

    Attributes:
        algo: The algorithm at work.
        stage: One of "text", "denoise", "decode" and "done".
        done: Number of finished steps of this stage.
        total: Number of steps of this stage.
    """

    algo: str
    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class FinishedVideo:
    """A finished video.

    Attributes:
        frames: uint8 [frames, height, width, 3].
        record: Record of the run.
        maps: Recorded block maps; None for dense attention.
    """

    frames: np.ndarray
    record: RunRecord
    maps: RecordedMaps | None


class _Stopped(Exception):
    """The caller no longer wants the video."""


def make_pair(
    pipeline: Any, request: GenerationRequest
) -> Generator[Step | FinishedVideo, None, None]:
    """Generate a request's video with dense attention, then with its own algorithm.

    Closing the iterator stops the work at its next denoising step and waits until it has stopped.

    Args:
        pipeline: A text-to-video pipeline that nobody else uses meanwhile.
        request: The video to generate.

    Yields:
        Every step, and each video when it is finished.

    Raises:
        ValueError: The model cannot take the request.
    """
    events: queue.Queue[Step | FinishedVideo | BaseException | None] = queue.Queue()
    stop = threading.Event()

    def watch(algo: str) -> ProgressCallback:
        def show(stage: str, done: int, total: int) -> None:
            if stop.is_set():
                raise _Stopped
            events.put(Step(algo, stage, done, total))

        return show

    def work() -> None:
        try:
            for asked in (request.with_algo("dense"), request):
                recorder = None
                if not asked.is_dense:
                    # What the algorithm compiles is not part of its seconds.
                    warm_up(pipeline, asked)
                    recorder = MapRecorder(pipeline, asked)
                frames, record = generate(
                    pipeline,
                    asked,
                    on_progress=watch(asked.sparse_algo),
                    on_apply=recorder.attach if recorder else None,
                )
                if recorder is None:
                    events.put(FinishedVideo(frames, record, None))
                else:
                    events.put(FinishedVideo(frames, recorder.note_in(record), recorder.result()))
        except BaseException as error:
            events.put(error)
        finally:
            events.put(None)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (event := events.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            yield event
    finally:
        stop.set()
        thread.join()
