"""`nabla generate --prompts`: a list of prompts to a folder of videos."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from nabla_attn.cli import options as opt
from nabla_attn.cli.loading import load_on_own_device
from nabla_attn.cli.output import notice, say

if TYPE_CHECKING:
    from nabla_attn.generation.prompt_list import Generate
    from nabla_attn.generation.request import GenerationRequest
    from nabla_attn.work_sharing import Shared


def make_list(
    prompts: Path,
    request: "GenerationRequest",
    folder: Path,
    fps: float,
    options: opt.VideoOptions,
    *,
    engine: str = "locks",
    workers: int | None = None,
) -> None:
    """Make the videos of a list that are not there yet; exit code 1 if some failed.

    Args:
        prompts: The list.
        request: What all have in common.
        folder: The folder of the videos.
        fps: Frames per second.
        options: The model, and where it runs.
        engine: How processes share the work.
        workers: Number of Ray's workers.
    """
    from nabla_attn.distributed import num_processes
    from nabla_attn.files import fingerprint_files
    from nabla_attn.generation import prompt_list
    from nabla_attn.generation.lora import lora_fingerprint_of
    from nabla_attn.generation.pipeline import model_directory
    from nabla_attn.work_sharing import share_work

    found = prompt_list.read_requests(prompts, request)
    directory = model_directory(options.model)
    # What changes the numbers; offloading does not.
    changes = {name: options.placement[name] for name in ("vae_tiling", "quantize")}
    given = {name: value for name, value in changes.items() if value}
    if options.lora:
        given["lora"] = [lora_fingerprint_of(each) for each in options.lora]
    if options.parts:
        given["parts"] = fingerprint_files(options.parts.parent, [options.parts])
    videos = prompt_list.name_videos(
        found.requests, directory, fps=fps, dtype=options.dtype, **given
    )
    prompt_list.check_folder(folder)
    first = next(iter(found.requests.values()))
    start = partial(_start, first, options, has_bars=engine == "locks")
    shared = share_work(
        prompt_list.make_work(folder, videos, start, fps),
        engine,
        # torchrun stops all when one ends with an error, so none ends before the others.
        wait=num_processes() > 1,
        workers=workers,
        has_gpus=options.device != "cpu",
        on_item=partial(_report, folder, videos),
    )
    _summarise_list(folder, len(videos) + len(found.broken), shared, found.broken)
    if shared.failed or found.broken:
        raise typer.Exit(1)


@contextmanager
def first_bars() -> Iterator[Any]:
    """Progress bars of the first process; the others' would overwrite them."""
    from nabla_attn.cli.progress import generation_bars
    from nabla_attn.distributed import is_first_process

    if not is_first_process():
        yield lambda label: None
        return
    with generation_bars() as start:
        yield start


def _start(
    request: "GenerationRequest", options: opt.VideoOptions, *, has_bars: bool
) -> "Generate":
    """Load the pipeline on this process's own device; what makes a video with it."""
    from nabla_attn.generation.generate import generate as make_video

    memory = options.foresee(request)
    pipeline = load_on_own_device(options.model, options.device, options.dtype, **options.loading)
    # Sizes are the same in all: one line now, or as many failures.
    options.check(pipeline, request, memory)

    def make(request: "GenerationRequest") -> Any:
        if not has_bars:
            return make_video(pipeline, request)
        with first_bars() as start:
            return make_video(
                pipeline, request, on_progress=start(" ".join(request.prompt.split())[:30])
            )

    return make


def _report(folder: Path, videos: dict[str, "GenerationRequest"], name: str, result: Any) -> None:
    from nabla_attn.work_sharing import Failure

    path = folder / f"{name}.mp4"
    if isinstance(result, Failure):
        notice("failed", f"{_rank_label()}{path}: {result}")
        return
    seconds = result.numbers["seconds"]["total"]
    text = " ".join(videos[name].prompt.split())[:60]
    say(f"{_rank_label()}{path}: seed {result.seed}, {seconds:.1f} s, {text}")


def _rank_label() -> str:
    from nabla_attn.distributed import num_processes, process_index

    return f"[{process_index()}] " if num_processes() > 1 else ""


def _summarise_list(folder: Path, count: int, shared: "Shared", broken: dict[str, str]) -> None:
    failed = broken | shared.failed
    parts = [f"{len(shared.made)} made", f"{len(shared.there)} already there"]
    if shared.elsewhere:
        parts.append(f"{len(shared.elsewhere)} being made by other processes")
    if failed:
        parts.append(f"{len(failed)} failed")
    say(f"{_rank_label()}{folder}: {count} videos: {', '.join(parts)}.")
    for name, reason in failed.items():
        notice("failed", f"{_rank_label()}{name}: {reason}")
