"""A list of prompts to a folder of videos, shared by any number of processes and machines."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nabla_attn.files import check_writable, is_whole, parse_json, read_lines
from nabla_attn.generation.model_index import fingerprint
from nabla_attn.generation.request import GenerationRequest, check_seed
from nabla_attn.generation.video import write_video
from nabla_attn.record import RunRecord
from nabla_attn.work_sharing import SharedWork

MAX_LINE_BYTES = 16384

Generate = Callable[[GenerationRequest], tuple[np.ndarray, RunRecord]]
"""A request to frames, uint8 [frames, height, width, 3], and the record of the run."""


@dataclass
class PromptList:
    """The videos of a list of prompts, and the lines that give none.

    Attributes:
        requests: Request of each video, by its place among the prompts, from 1.
        broken: What is wrong with each line that cannot be used, by its name.
    """

    requests: dict[int, GenerationRequest] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)


def read_prompt_list(path: Path) -> list[tuple[str, int | None]]:
    """Prompt and perhaps seed of every line; blank ones and those that start with # are skipped.

    Args:
        path: A UTF-8 file; each line is a prompt, or a JSON object with `prompt` and perhaps
            `seed`.

    Raises:
        ValueError: The file cannot be read or has no prompt, or a line is too long, not UTF-8, or
            not such an object; the line is named.
    """
    found = []
    for number, line in _parse_lines(path):
        if isinstance(line, ValueError):
            raise ValueError(f"{path}, line {number}: {line}") from line
        found.append(line)
    return found


def read_requests(path: Path, request: GenerationRequest) -> PromptList:
    """The requests of a list of prompts; a broken line stops none of the others.

    Args:
        path: A file that `read_prompt_list` describes.
        request: What all have in common, and the seed of lines without one.

    Raises:
        ValueError: The file cannot be read or has no prompt that can be used.
    """
    found = PromptList()
    for place, (number, line) in enumerate(_parse_lines(path), start=1):
        try:
            if isinstance(line, ValueError):
                raise line
            prompt, seed = line
            seed = request.seed if seed is None else seed
            found.requests[place] = replace(request, prompt=prompt, seed=seed)
        except ValueError as error:
            found.broken[f"line {number}"] = str(error)
    if not found.requests:
        name, reason = next(iter(found.broken.items()))
        raise ValueError(f"{path}, {name}: {reason}")
    return found


def name_videos(
    requests: dict[int, GenerationRequest], model: Path, **options: Any
) -> dict[str, GenerationRequest]:
    """Names by place in the list and a hash of all that the video depends on.

    Args:
        requests: The requests by their place.
        model: The pipeline directory. Its files count, not its place, which machines may differ in.
        options: What else changes a video, such as the frame rate; plain JSON values.
    """
    common = {"model": fingerprint(model)} | options
    named = {}
    for index, request in requests.items():
        text = json.dumps(request.to_dict() | common, sort_keys=True)
        named[f"{index:04d}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"] = request
    return named


def is_done(folder: Path, name: str) -> bool:
    """Whether a video is finished: its record, written last, and the mp4 are there."""
    return all(is_whole(folder / f"{name}{suffix}") for suffix in (".json", ".mp4"))


def make_work(
    folder: Path,
    videos: dict[str, GenerationRequest],
    start: Callable[[], Generate],
    fps: float,
) -> SharedWork:
    """The work of a list, for `share_work`: each video is tried once and fails alone.

    Args:
        folder: The folder that they go to.
        videos: The requests as `name_videos` names them.
        start: Loads the pipeline and returns what generates a video with it.
        fps: Frames per second.
    """
    return SharedWork(
        folder=folder,
        items=list(videos),
        start=partial(_start, folder, videos, start, fps),
        is_done=partial(is_done, folder),
        failures=(ValueError, OSError, RuntimeError, MemoryError),
    )


def _start(
    folder: Path,
    videos: dict[str, GenerationRequest],
    start: Callable[[], Generate],
    fps: float,
) -> Callable[[str], RunRecord]:
    generate = start()

    def make(name: str) -> RunRecord:
        frames, record = generate(videos[name])
        write_video(frames, folder / f"{name}.mp4", fps)
        record.save(folder / f"{name}.json")
        return record

    return make


def check_folder(folder: Path) -> None:
    """Make the folder and check that it can be written.

    Raises:
        ValueError: It is a file, or cannot be made or written.
    """
    if folder.suffix.lower() == ".mp4" or folder.is_file():
        raise ValueError(f"--prompts writes a folder of videos, got the file {folder}.")
    check_writable(folder / "0001.mp4")


def _parse_lines(path: Path) -> Iterator[tuple[int, tuple[str, int | None] | ValueError]]:
    """Number of every line that is no comment, with its prompt and seed, or what is wrong.

    Raises:
        ValueError: The file cannot be read, or has no such line.
    """
    is_empty = True
    for number, line in read_lines(path, MAX_LINE_BYTES):
        found: tuple[str, int | None] | ValueError | None
        try:
            found = line if isinstance(line, ValueError) else _read_line(line)
        except ValueError as error:
            found = error
        if found is not None:
            is_empty = False
            yield number, found
    if is_empty:
        raise ValueError(f"{path} has no prompt. Write one per line.")


def _read_line(line: str) -> tuple[str, int | None] | None:
    """Prompt and seed of one line; nothing for a blank line or a comment."""
    text = line.strip()
    if not text or text.startswith("#"):
        return None
    if not text.startswith("{"):
        return text, None
    try:
        values = parse_json(text)
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error}).") from error
    prompt, seed = values.get("prompt"), values.get("seed", 0)
    has_types = isinstance(prompt, str) and isinstance(seed, int) and not isinstance(seed, bool)
    if not has_types or values.keys() - {"prompt", "seed"}:
        raise ValueError(f'expected {{"prompt": TEXT, "seed": NUMBER}}, got {text[:80]!r}.')
    return prompt, check_seed(seed) if "seed" in values else None
