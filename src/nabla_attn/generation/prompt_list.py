"""A list of prompts to a folder of videos, shared by any number of processes and machines."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from nabla_attn.files import check_writable
from nabla_attn.generation.pipeline import fingerprint
from nabla_attn.generation.request import GenerationRequest, check_seed
from nabla_attn.generation.video import write_video
from nabla_attn.record import RunRecord

MAX_LINE_BYTES = 16384
WAIT_SECONDS = 2.0

Make = Callable[[GenerationRequest], tuple[np.ndarray, RunRecord]]
"""A request to frames, uint8 [frames, height, width, 3], and the record of the run."""


@dataclass
class Outcome:
    """What became of each video of a list, by name.

    Attributes:
        made: by this process.
        there: finished before, or by another process meanwhile.
        failed: with the reason.
        elsewhere: another process was still at it in the end.
    """

    made: list[str] = field(default_factory=list)
    there: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    elsewhere: list[str] = field(default_factory=list)


def read_lines(path: Path) -> list[tuple[str, int | None]]:
    """Prompt and perhaps seed of every line; blank ones and those that start with # are skipped.

    Args:
        path: UTF-8; each line is a prompt, or a JSON object with ``prompt`` and perhaps ``seed``.

    Raises:
        ValueError: the file cannot be read, has no prompt, or a line is too long, not UTF-8, or not
            such an object; the line is named.
    """
    found = []
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                try:
                    found += _read_line(line)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: {error}") from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ValueError(f"cannot read the prompts {path}: {reason}.") from error
    if not found:
        raise ValueError(f"{path} has no prompt. Write one per line.")
    return found


def read_requests(path: Path, request: GenerationRequest) -> list[GenerationRequest]:
    """One request per line of a file that `read_lines` takes.

    Args:
        path: the file.
        request: what all have in common, and the seed of lines without one.
    """
    return [
        replace(request, prompt=prompt, seed=request.seed if seed is None else seed)
        for prompt, seed in read_lines(path)
    ]


def name_videos(
    requests: list[GenerationRequest], model: Path, **options: Any
) -> dict[str, GenerationRequest]:
    """Names by place in the list and a hash of all that the video depends on.

    Args:
        requests: in the order of the list.
        model: the pipeline directory. Its files count, not its place, which machines may differ in.
        options: what else changes a video, such as the frame rate; plain JSON values.
    """
    common = {"model": fingerprint(model)} | options
    named = {}
    for index, request in enumerate(requests, start=1):
        text = json.dumps(request.to_dict() | common, sort_keys=True)
        named[f"{index:04d}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"] = request
    return named


def is_done(folder: Path, name: str) -> bool:
    """Whether a video is finished: its record, written last, and the mp4 are there."""
    return all((folder / f"{name}{suffix}").is_file() for suffix in (".json", ".mp4"))


def make_videos(
    folder: Path,
    videos: dict[str, GenerationRequest],
    make: Make,
    fps: float,
    *,
    wait: bool = False,
    tell: Callable[[str, RunRecord | str], None] = lambda name, result: None,
) -> Outcome:
    """Make the videos that are neither finished nor being made by another process.

    Each is tried once. One that fails does not stop the others.

    Args:
        folder: where they go; shared by all processes at this list.
        videos: from :func:`name_videos`.
        make: makes one.
        fps: frames per second.
        wait: stay until nobody is at a video of the list, to take over from those that end early.
        tell: given each name with its record, or the reason why it failed.
    """
    outcome = Outcome()
    left = dict(videos)
    while True:
        had = len(left)
        for name, request in list(left.items()):
            result = _make_locked(folder, name, request, make, fps)
            if isinstance(result, RunRecord):
                outcome.made.append(name)
                tell(name, result)
            elif is_done(folder, name):
                outcome.there.append(name)
            elif result is not None:
                outcome.failed[name] = result
                tell(name, result)
            else:
                continue
            del left[name]
        if not left or (len(left) == had and not wait):
            break
        if len(left) == had:
            time.sleep(WAIT_SECONDS)
    outcome.elsewhere = list(left)
    return outcome


def _make_locked(
    folder: Path, name: str, request: GenerationRequest, make: Make, fps: float
) -> RunRecord | str | None:
    """The record of the video made, why it failed, or None if it is not ours to make."""
    path = folder / f".{name}.lock"
    # The system frees a lock when its process ends, however it ends: a killed run goes on at once.
    lock = FileLock(path, blocking=False)
    if is_done(folder, name):
        return None
    try:
        with lock:
            if is_done(folder, name):
                return None
            # What a killed process was writing.
            for leftover in folder.glob(f".{name}.*.tmp"):
                leftover.unlink(missing_ok=True)
            frames, record = make(request)
            write_video(frames, folder / f"{name}.mp4", fps)
            record.save(folder / f"{name}.json")
            return record
    except Timeout:
        return None
    except (ValueError, OSError, RuntimeError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    finally:
        # Who still opens it finds the video done; before that, removing it would let two work.
        if is_done(folder, name):
            path.unlink(missing_ok=True)


def check_folder(folder: Path) -> None:
    """Make the folder and see that it can be written.

    Raises:
        ValueError: it is a file, or cannot be made or written.
    """
    if folder.suffix.lower() == ".mp4" or folder.is_file():
        raise ValueError(f"--prompts writes a folder of videos, got the file {folder}.")
    check_writable(folder / "0001.mp4")


def _read_line(line: bytes) -> list[tuple[str, int | None]]:
    """Prompt and seed of one line; nothing for a blank line or a comment."""
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"longer than {MAX_LINE_BYTES} bytes.")
    try:
        text = line.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1}). Save the file as UTF-8.") from error
    if not text or text.startswith("#"):
        return []
    if not text.startswith("{"):
        return [(text, None)]
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error}).") from error
    prompt, seed = values.get("prompt"), values.get("seed", 0)
    has_types = isinstance(prompt, str) and isinstance(seed, int) and not isinstance(seed, bool)
    if not has_types or values.keys() - {"prompt", "seed"}:
        raise ValueError(f'expected {{"prompt": TEXT, "seed": NUMBER}}, got {text[:80]}.')
    return [(prompt, check_seed(seed) if "seed" in values else None)]
