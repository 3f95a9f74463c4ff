"""``nabla generate --prompts``: a list of prompts to a folder of videos."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from nabla_attn.cli import options as opt

if TYPE_CHECKING:
    from nabla_attn.generation.prompt_list import Make, Outcome
    from nabla_attn.generation.request import GenerationRequest
    from nabla_attn.record import RunRecord


def make_list(
    prompts: Path,
    request: "GenerationRequest",
    folder: Path,
    fps: float,
    options: opt.VideoOptions,
) -> None:
    """Make the videos of a list that are not there yet; exit code 1 if some failed.

    Args:
        prompts: the list.
        request: what all have in common.
        folder: where they go.
        fps: frames per second.
        options: the model, and where it runs.
    """
    from nabla_attn.distributed import num_processes
    from nabla_attn.generation import prompt_list
    from nabla_attn.generation.pipeline import model_directory

    requests = prompt_list.read_requests(prompts, request)
    directory = model_directory(options.model)
    videos = prompt_list.name_videos(requests, directory, fps=fps, dtype=options.dtype)
    prompt_list.check_folder(folder)

    def tell(name: str, result: "RunRecord | str") -> None:
        path = folder / f"{name}.mp4"
        if isinstance(result, str):
            typer.echo(f"{_rank_label()}{path}: failed: {result}", err=True)
        else:
            seconds = result.numbers["seconds"]["total"]
            text = " ".join(videos[name].prompt.split())[:60]
            typer.echo(f"{_rank_label()}{path}: seed {result.seed}, {seconds:.1f} s, {text}")

    if all(prompt_list.is_done(folder, name) for name in videos):
        outcome = prompt_list.Outcome(there=list(videos))
    else:
        make = _maker(requests, options)
        # torchrun stops all when one ends with an error, so none ends before the others.
        wait = num_processes() > 1
        outcome = prompt_list.make_videos(folder, videos, make, fps, wait=wait, tell=tell)
    _summarise_list(folder, len(videos), outcome)
    if outcome.failed:
        raise typer.Exit(1)


@contextmanager
def first_bars() -> Iterator[Any]:
    """Progress bars of the first process; the others' would overwrite them."""
    from nabla_attn.cli.progress import generation_bars
    from nabla_attn.distributed import process_index

    if process_index() != 0:
        yield lambda label: None
        return
    with generation_bars() as start:
        yield start


def _maker(requests: "list[GenerationRequest]", options: opt.VideoOptions) -> "Make":
    """Load the pipeline on this process's own device; what makes a video with it."""
    import torch

    from nabla_attn.distributed import local_device
    from nabla_attn.generation.generate import generate as make_video
    from nabla_attn.generation.pipeline import resolve_device
    from nabla_attn.generation.request import check_request

    place = local_device(resolve_device(options.device))
    if place.type == "cuda":
        torch.cuda.set_device(place)
    pipeline = options.load(str(place))
    # Sizes are the same in all: one line now, or as many failures.
    check_request(pipeline, requests[0])

    def make(request: "GenerationRequest") -> Any:
        with first_bars() as start:
            return make_video(
                pipeline, request, on_progress=start(" ".join(request.prompt.split())[:30])
            )

    return make


def _rank_label() -> str:
    from nabla_attn.distributed import num_processes, process_index

    return f"[{process_index()}] " if num_processes() > 1 else ""


def _summarise_list(folder: Path, count: int, outcome: "Outcome") -> None:
    parts = [f"{len(outcome.made)} made", f"{len(outcome.there)} already there"]
    if outcome.elsewhere:
        parts.append(f"{len(outcome.elsewhere)} being made by other processes")
    if outcome.failed:
        parts.append(f"{len(outcome.failed)} failed")
    typer.echo(f"{_rank_label()}{folder}: {count} videos: {', '.join(parts)}.")
    for name, reason in outcome.failed.items():
        typer.echo(f"{_rank_label()}failed: {name}: {reason}", err=True)
