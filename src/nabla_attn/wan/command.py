"""Generate from a Wan checkpoint as the reference's command does."""

import re
import shutil
import warnings
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nabla_attn import distributed
from nabla_attn.files import check_writable, whole_file
from nabla_attn.generation.generate import generate
from nabla_attn.generation.pipeline import load_pipeline
from nabla_attn.generation.placement import resolve_device, resolve_dtype
from nabla_attn.generation.request import GenerationRequest, ModelDefaults
from nabla_attn.generation.text import watch_texts
from nabla_attn.generation.video import write_video
from nabla_attn.progress import ProgressCallback, ignore_progress
from nabla_attn.record import RunRecord
from nabla_attn.wan.layout import is_diffusers_directory, read_layout
from nabla_attn.wan.pipeline import load_wan_pipeline, resize_as_reference
from nabla_attn.wan.placement import WanPlacement, check_placement, distribute
from nabla_attn.wan.prompt_extension import PromptExtension
from nabla_attn.wan.request import (
    WanRequest,
    aspect_of,
    fit_inputs,
    read_inputs,
    video_size,
)
from nabla_attn.wan.shapes import WanConfig
from nabla_attn.wan.tasks import WanTask, family_of_task, find_task, width_and_height


def chosen_sparsity(request: WanRequest) -> tuple[str, str]:
    """The algorithm of a request and where it comes from.

    An explicit one wins, then the checkpoint's own, then dense. The reference always runs its
    flag's default nabla-0.7, even on checkpoints trained for another algorithm.
    """
    if request.sparse_algo is not None:
        return request.sparse_algo, "as asked for"
    if is_diffusers_directory(request.ckpt_dir):
        own: str | None = ModelDefaults.load(Path(request.ckpt_dir)).sparse_algo
        own = None if own == "dense" else own
    else:
        own = read_layout(request.ckpt_dir).config.sparse_algo
    if own is not None:
        return own, "the checkpoint's own"
    return "dense", "the checkpoint names no algorithm; pass --sparse_algo nabla-0.7 for sparse"


@dataclass(frozen=True)
class WanJob:
    """A run of the command, checked as far as can be before anything is loaded.

    Attributes:
        request: The request with every default filled in.
        placement: Where the parts run.
        output: The mp4 to write, or png for an image; the record lies beside it.
        algo: The algorithm of attention.
        source: Where that comes from, in words.
        is_extended: Whether the prompt was rewritten.
    """

    request: WanRequest
    placement: WanPlacement
    output: Path
    algo: str
    source: str
    is_extended: bool = False

    @classmethod
    def prepare(
        cls,
        request: WanRequest,
        placement: WanPlacement,
        output: Path | None = None,
        extension: PromptExtension | None = None,
    ) -> "WanJob":
        """Check a run, name its output after the prompt unless it has a name, extend the prompt.

        Raises:
            ValueError: Flags, checkpoint, task, output or machine do not fit; the message says what
                to do.
        """
        request = request.resolved()
        task = find_task(request.task)
        output = output or _name_after(request, placement)
        if output.suffix.lower() != _suffix(task):
            raise ValueError(f"{request.task} writes a {_suffix(task)} file, got {output}.")
        check_writable(output)
        _check_space(request, output)
        algo, source = chosen_sparsity(request)
        if extension is not None:
            device = resolve_device(placement.device)
            prompt = extension.extend(request.prompt, request.seed, device)
            request = replace(request, prompt=prompt)
        is_extended = extension is not None and extension.is_on
        return cls(request, placement, output, algo, source, is_extended)

    @property
    def heading(self) -> str:
        """What runs, for the user to see before it does."""
        request = self.request
        line = f"{request.task}: attention {self.algo} ({self.source}); seed {request.seed}"
        return f"{line}; extended prompt: {request.prompt}" if self.is_extended else line

    def run(self, *, on_progress: ProgressCallback, on_load: ProgressCallback) -> str | None:
        """Make the video and write it with its record.

        Returns:
            A summary in one line; None in processes other than the first, which write nothing.

        Raises:
            ValueError: As `generate_wan`.
        """
        frames, record = generate_wan(
            self.request, self.placement, on_progress=on_progress, on_load=on_load
        )
        if not distributed.is_first_process():
            return None
        task = find_task(self.request.task)
        if task.makes_image:
            _write_image(frames[0], self.output)
        else:
            write_video(frames, self.output, task.fps)
        path = self.output.with_suffix(".json")
        record.save(path)
        count, height, width, _ = frames.shape
        kept, seconds = record.numbers["attention"]["density"], record.numbers["seconds"]["total"]
        return (
            f"{self.output}: {width}x{height}, {count} frames, {self.algo}, {kept:.1%} of token "
            f"pairs kept, {seconds:.1f} s. Record: {path}"
        )


def generate_wan(
    request: WanRequest,
    placement: WanPlacement | None = None,
    *,
    on_progress: ProgressCallback = ignore_progress,
    on_load: ProgressCallback = ignore_progress,
) -> tuple[np.ndarray, RunRecord]:
    """Make the video or image of one request.

    Args:
        request: The request; defaults are filled in by task.
        placement: Where the parts run; None is one device.
        on_progress: Called at text, steps and decoding.
        on_load: Called while loading.

    Returns:
        The frames, uint8 [frames, height, width, 3], and the record of the run.

    Raises:
        ValueError: Flags, checkpoint, task or machine do not fit; the message says what to do.
    """
    placement = placement or WanPlacement()
    request = request.resolved()
    algo, source = chosen_sparsity(request)
    check_placement(placement, is_sparse=algo != "dense")
    assert request.frames is not None
    inputs = read_inputs(request.inputs, request.frames)
    device = distributed.local_device(resolve_device(placement.device))
    request = distributed.same_everywhere(request, device)
    pipe, text_tokens = _load(request, placement, device, on_load)
    if "image" in inputs:
        pipe = _with_image(pipe)
    video = _to_generation_request(pipe, request, algo, inputs)
    inputs |= _call_options(pipe, request, text_tokens, device)
    inputs |= _place(pipe, placement, device, video, text_tokens)
    frames, record = generate(pipe, video, on_progress=on_progress, inputs=inputs)
    config = record.config | {"wan": request.to_dict(), "sparse_algo_source": source}
    return frames, replace(record, config=config | {"model": Path(request.ckpt_dir).name})


def _load(
    request: WanRequest, placement: WanPlacement, device: torch.device, on_load: ProgressCallback
) -> tuple[Any, int]:
    """The pipeline on the CPU, and the number of tokens that its prompts are padded to."""
    from nabla_attn.wan.reference import build_solver

    assert request.shift is not None
    if is_diffusers_directory(request.ckpt_dir):
        pipe = load_pipeline(request.ckpt_dir, device="cpu", dtype=placement.dtype)
        _check_pipeline(request, type(pipe).__name__)
        pipe.scheduler = build_solver(request.solver, request.shift)
        return resize_as_reference(pipe), WanConfig.text_len
    dtype = resolve_dtype(placement.dtype, device)
    pipe = load_wan_pipeline(
        request.ckpt_dir,
        request.task,
        sparse_algo="dense",  # generate() applies it, and measures
        dtype=dtype,
        text_dtype=dtype,
        solver=request.solver,
        shift=request.shift,
        on_progress=on_load,
    )
    return pipe, read_layout(request.ckpt_dir).config.text_len


def _check_pipeline(request: WanRequest, found: str) -> None:
    wanted = family_of_task(request.task).pipeline
    if found != wanted:
        raise ValueError(
            f"{request.ckpt_dir} is a {found}, {request.task} needs a {wanted}. Pass another task, "
            "or the directory of a checkpoint for this one."
        )


def _with_image(pipe: Any) -> Any:
    """TI2V-5B loads as text-to-video; with an image the same parts make the other pipeline."""
    from diffusers import WanImageToVideoPipeline

    if type(pipe).__name__ != "WanPipeline":
        return pipe
    expand: Any = pipe.config.expand_timesteps
    return resize_as_reference(WanImageToVideoPipeline(**pipe.components, expand_timesteps=expand))


def _to_generation_request(
    pipe: Any, request: WanRequest, algo: str, inputs: dict[str, Any]
) -> GenerationRequest:
    """The request as every pipeline takes it; the source video in `inputs` is made to fit."""
    spatial = pipe.vae_scale_factor_spatial
    unit = spatial * pipe.transformer.config.patch_size[1]
    size = video_size(
        request.size,
        unit=unit,
        latent_pixels=spatial,
        crop=request.crop_to_blocks,
        aspect=aspect_of(inputs),
    )
    width, height = fit_inputs(inputs, size, unit)
    schedule = None
    if request.sparse_algo is None and is_diffusers_directory(request.ckpt_dir):
        schedule = ModelDefaults.load(Path(request.ckpt_dir)).schedule
    assert request.frames is not None and request.steps is not None
    assert request.guidance is not None and request.negative_prompt is not None
    return GenerationRequest(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        height=height,
        width=width,
        frames=request.frames,
        steps=request.steps,
        guidance=request.guidance,
        seed=request.seed,
        sparse_algo=algo,
        schedule=schedule,
    )


def _call_options(
    pipe: Any, request: WanRequest, text_tokens: int, device: torch.device
) -> dict[str, Any]:
    """Arguments of the call that the plain request has no field for."""
    options: dict[str, Any] = {
        "max_sequence_length": text_tokens,
        # The reference draws on the run's device, so a seed gives other noise on a GPU.
        "generator": torch.Generator(device).manual_seed(request.seed),
    }
    if pipe.config.get("boundary_ratio") is not None:
        task = find_task(request.task)
        is_default = request.guidance == task.guidance
        options["guidance_scale_2"] = task.guidance_low_noise if is_default else request.guidance
    return options


def _place(
    pipe: Any,
    placement: WanPlacement,
    device: torch.device,
    video: GenerationRequest,
    text_tokens: int,
) -> dict[str, Any]:
    """Move the parts to where they run; returns the prompt's embedding if it is made beforehand."""
    embedded: dict[str, Any] = {}
    if placement.vae_tiling:
        pipe.vae.enable_tiling()
    if placement.t5_cpu and device.type != "cpu":
        cpu = torch.device("cpu")
        with watch_texts(pipe, video):
            cond, uncond = pipe.encode_prompt(
                video.prompt, video.negative_prompt, max_sequence_length=text_tokens, device=cpu
            )
        pipe.text_encoder = None
        embedded = {"prompt": None, "negative_prompt": None}
        embedded |= {"prompt_embeds": cond.to(device), "negative_prompt_embeds": uncond.to(device)}
    distribute(pipe, placement, device)
    if device.type == "cpu":
        if placement.offload_model:
            warnings.warn("--offload_model is ignored: there is no GPU to free.", stacklevel=2)
        return embedded
    offload = placement.offload_model
    if offload is None:
        offload = distributed.num_processes() == 1
    if offload:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    return embedded


def _suffix(task: WanTask) -> str:
    return ".png" if task.makes_image else ".mp4"


def _name_after(request: WanRequest, placement: WanPlacement) -> Path:
    """The reference's file name, with x for the * that shells and Windows dislike."""
    words = re.sub(r"[^\w.-]+", "_", request.prompt)[:50].strip("._") or "video"
    size = request.size.replace("*", "x")
    stamp = datetime.now().strftime("%Y%m%d_%H%M%S")
    shares = f"{placement.ulysses_size}_{placement.ring_size}"
    suffix = _suffix(find_task(request.task))
    return Path(f"{request.task}_{size}_{shares}_{words}_{stamp}{suffix}")


def _check_space(request: WanRequest, output: Path) -> None:
    width, height = width_and_height(request.size)
    # Half a byte a pixel is far above what the encoder writes.
    needed = width * height * (request.frames or 1) // 2
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        raise ValueError(
            f"no space for {output}: it may take {needed / 2**20:.0f} MiB, the disk has "
            f"{free / 2**20:.0f} MiB free."
        )


def _write_image(frame: np.ndarray, output: Path) -> None:
    from PIL import Image

    with whole_file(output) as temporary:
        Image.fromarray(frame).save(temporary, format="PNG")
