"""Generate from an original Wan checkpoint as the reference's command does."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nabla_attn import distributed
from nabla_attn.generation.generate import generate
from nabla_attn.generation.pipeline import load_pipeline, resolve_device, resolve_dtype
from nabla_attn.generation.request import GenerationRequest, ModelDefaults
from nabla_attn.progress import ProgressCallback, ignore_progress
from nabla_attn.record import RunRecord
from nabla_attn.schedule import Schedule
from nabla_attn.wan import is_diffusers_directory, load_wan_pipeline, read_layout
from nabla_attn.wan import placement as wan_placement
from nabla_attn.wan.families import check_pipeline
from nabla_attn.wan.inputs import aspect_of, read_inputs
from nabla_attn.wan.layout import TEXT_TOKENS
from nabla_attn.wan.request import WanRequest, video_size
from nabla_attn.wan.solvers import build_solver
from nabla_attn.wan.sparsity import stored_sparsity
from nabla_attn.wan.tasks import find_task


@dataclass(frozen=True)
class WanPlacement:
    """Where the parts run and how they share memory.

    Attributes:
        device: ``"auto"`` or a torch device.
        dtype: of transformer and image encoder, a name or ``"auto"``.
        offload_model: keep on the GPU only the part at work; None is yes on one GPU.
        t5_cpu: run the text encoder on the CPU.
        t5_fsdp: shard the text encoder over the processes.
        dit_fsdp: shard the transformer over the processes.
        ulysses_size: processes that share one sequence, head-wise.
        ring_size: processes that share one sequence, ring-wise; dense only.
        vae_tiling: decode in tiles, with less memory and slightly other numbers.
    """

    device: str = "auto"
    dtype: str = "auto"
    offload_model: bool | None = None
    t5_cpu: bool = False
    t5_fsdp: bool = False
    dit_fsdp: bool = False
    ulysses_size: int = 1
    ring_size: int = 1
    vae_tiling: bool = False


def chosen_sparsity(request: WanRequest) -> tuple[str, str]:
    """The algorithm of a request and where it comes from.

    An explicit one wins, then the checkpoint's own, then dense. The reference always runs its
    flag's default nabla-0.7, even on checkpoints trained for another algorithm.
    """
    if request.sparse_algo is not None:
        return request.sparse_algo, "as asked for"
    path = Path(request.ckpt_dir)
    own = stored_sparsity(path) if is_diffusers_directory(path) else read_layout(path).sparse_algo
    if own is not None:
        return own, "the checkpoint's own"
    return "dense", "the checkpoint names no algorithm; pass --sparse_algo nabla-0.7 for sparse"


def _own_schedule(request: WanRequest) -> Schedule | None:
    """The rules that a diffusers directory carries with its own algorithm."""
    if request.sparse_algo is not None or not is_diffusers_directory(request.ckpt_dir):
        return None
    return ModelDefaults.load(Path(request.ckpt_dir)).schedule


def generate_wan(
    request: WanRequest,
    placement: WanPlacement | None = None,
    *,
    progress: ProgressCallback | None = None,
    load_progress: ProgressCallback | None = None,
) -> tuple[np.ndarray, RunRecord]:
    """Make the video or image of one request.

    Args:
        request: what to make; defaults are filled in by task.
        placement: where; None is one device.
        progress: told of text, steps and decoding.
        load_progress: told of loading.

    Returns:
        The frames, uint8 [frames, height, width, 3], and the record of the run.

    Raises:
        ValueError: flags, checkpoint, task or machine do not fit; the message says how to mend it.
    """
    placement = placement or WanPlacement()
    request = request.resolved()
    algo, source = chosen_sparsity(request)
    wan_placement.check(placement, is_sparse=algo != "dense")
    assert request.frames is not None
    inputs = read_inputs(request.inputs, request.frames)
    device = distributed.local_device(resolve_device(placement.device))
    request = distributed.same_everywhere(request, device)
    pipe, text_tokens = _load(request, placement, device, load_progress)
    if "image" in inputs:
        pipe = _with_image(pipe)
    inputs |= _call_options(pipe, request, text_tokens, device)
    inputs |= _place(pipe, placement, device, request, text_tokens)
    video = _to_generation_request(pipe, request, algo, aspect_of(inputs))
    frames, record = generate(pipe, video, on_progress=progress or ignore_progress, inputs=inputs)
    config = record.config | {"wan": request.to_dict(), "sparse_algo_source": source}
    return frames, replace(record, config=config | {"model": Path(request.ckpt_dir).name})


def _load(
    request: WanRequest,
    placement: WanPlacement,
    device: torch.device,
    progress: ProgressCallback | None,
) -> tuple[Any, int]:
    dtype = resolve_dtype(placement.dtype, device)
    assert request.shift is not None
    if is_diffusers_directory(request.ckpt_dir):
        pipe = load_pipeline(request.ckpt_dir, device="cpu", dtype=placement.dtype)
        check_pipeline(request.task, type(pipe), request.ckpt_dir)
        pipe.scheduler = build_solver(request.solver, request.shift)
        return pipe, TEXT_TOKENS
    pipe = load_wan_pipeline(
        request.ckpt_dir,
        request.task,
        sparse_algo="dense",  # generate() applies it, and measures
        dtype=dtype,
        text_dtype=dtype,
        solver=request.solver,
        shift=request.shift,
        **({"progress": progress} if progress else {}),
    )
    return pipe, read_layout(request.ckpt_dir).text_tokens


def _with_image(pipe: Any) -> Any:
    """TI2V-5B loads as text-to-video; with an image the same parts make the other pipeline."""
    from diffusers import WanImageToVideoPipeline

    if type(pipe).__name__ != "WanPipeline":
        return pipe
    from nabla_attn.wan.image_input import WanVideoProcessor

    image_pipe: Any = WanImageToVideoPipeline(
        **pipe.components, expand_timesteps=pipe.config.expand_timesteps
    )
    image_pipe.video_processor = WanVideoProcessor(vae_scale_factor=pipe.vae_scale_factor_spatial)
    return image_pipe


def _call_options(
    pipe: Any, request: WanRequest, text_tokens: int, device: torch.device
) -> dict[str, Any]:
    """Arguments of the call that the plain request has no field for."""
    options: dict[str, Any] = {
        "max_sequence_length": text_tokens,
        # The reference draws on the run's device, so a seed gives other noise on a GPU.
        "generator": torch.Generator(device).manual_seed(request.seed),
    }
    low = find_task(request.task).guidance_low_noise
    if pipe.config.get("boundary_ratio") is not None:
        is_default = request.guidance == find_task(request.task).guidance
        options["guidance_scale_2"] = low if is_default else request.guidance
    return options


def _place(
    pipe: Any,
    placement: WanPlacement,
    device: torch.device,
    request: WanRequest,
    text_tokens: int,
) -> dict[str, Any]:
    """Move the parts where they run; gives the prompt's embedding if it is made beforehand."""
    embedded: dict[str, Any] = {}
    if placement.vae_tiling:
        pipe.vae.enable_tiling()
    if placement.t5_cpu and device.type != "cpu":
        cond, uncond = pipe.encode_prompt(
            request.prompt,
            request.negative_prompt,
            max_sequence_length=text_tokens,
            device=torch.device("cpu"),
        )
        pipe.text_encoder = None
        embedded = {"prompt": None, "negative_prompt": None}
        embedded |= {"prompt_embeds": cond.to(device), "negative_prompt_embeds": uncond.to(device)}
    wan_placement.distribute(pipe, placement, device)
    if device.type == "cpu":
        return embedded
    offload = placement.offload_model
    if offload is None:
        offload = distributed.num_processes() == 1
    if offload:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    return embedded


def _to_generation_request(
    pipe: Any, request: WanRequest, algo: str, aspect: float | None
) -> GenerationRequest:
    patch = pipe.transformer.config.patch_size
    spatial = pipe.vae_scale_factor_spatial
    width, height = video_size(
        request.size,
        unit=spatial * patch[1],
        latent_pixels=spatial,
        crop=request.crop_to_blocks,
        aspect=aspect,
    )
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
        schedule=_own_schedule(request),
    )
