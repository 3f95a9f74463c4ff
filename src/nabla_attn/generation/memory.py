"""The memory that a video takes, against what the machine has, before anything is loaded."""

import inspect
from collections.abc import Collection
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from nabla_attn.config import parse
from nabla_attn.cost.memory import (
    MemoryEstimate,
    activation_bytes,
    free_bytes,
    sparse_bytes,
    traced_peak,
)
from nabla_attn.errors import first_line
from nabla_attn.files import read_object
from nabla_attn.generation.call import check_frames
from nabla_attn.generation.model_index import (
    check_layers,
    find_class,
    named_parts,
    read_model_index,
)
from nabla_attn.generation.pipeline import dtype_of_vae
from nabla_attn.generation.placement import Placement
from nabla_attn.generation.request import GenerationRequest, check_size
from nabla_attn.models import find_row
from nabla_attn.sizes import denoisers, token_grid, vae_strides

TILE = 256  # pixels along a side of the tiles that diffusers' VAEs decode
# A tiled VAE holds the video in rows of tiles and joins them: measured, in videos of its numbers.
TILED_VIDEOS = 4.7
# Of each number of the video on the CPU: the VAE's and the pipeline's floats, scaled and rounded
# copies, and the byte of the frames.
FRAME_BYTES = 4 * 4 + 1
# Of the bytes of a video: what an encoder of few channels at full size holds at most.
ENCODER_WIDTH = 64
GPU_SCRATCH = 2**29  # workspace of the kernels that make and use maps
CHUNKS = (5, 9)  # latent frames traced of a VAE that decodes them one after another
MAX_SIZE = 2**24
"""Widths and numbers of heads are below this."""
QUANTIZED_SHARE = {"int8": 0.5, "torchao": 0.5, "nf4": 0.28}  # of the bytes of 16-bit weights


def estimate_memory(
    directory: Path,
    request: GenerationRequest,
    *,
    device: torch.device,
    dtype: torch.dtype,
    placement: Placement | None = None,
    given: Collection[str] = (),
) -> MemoryEstimate:
    """Estimate the memory of one video from the files of its model; no weights are read.

    The transformer is a formula of its tokens, held against measured peaks of Wan; decoding is the
    VAE's own code, run without data. Not counted are the workspace of libraries on a GPU and the
    buffers of the mp4's encoder.

    Args:
        directory: The pipeline directory.
        request: The video to make.
        device: The device of the pipeline.
        dtype: Dtype of transformer and text encoder.
        placement: How memory is saved; None is nothing.
        given: Frames that are given, as arguments of the pipeline's call, such as "image".

    Returns:
        The bytes on `device`; those of the CPU beside a GPU are much fewer.

    Raises:
        ValueError: The directory has a part that cannot be read, or the model cannot take the size
            or does not read the given frames or needs others.
    """
    placement = placement or Placement()
    pipeline = hollow_pipeline(directory)
    check_frames(pipeline, given)
    check_size(pipeline, request)
    parts = part_bytes(directory, dtype, placement.quantize)
    is_cpu = device.type == "cpu"
    stages = {
        "encoding text": _text_bytes(directory, dtype),
        "denoising": _denoising_bytes(pipeline, request, dtype, is_cpu=is_cpu),
        "decoding": _decoding_bytes(pipeline, request, dtype, placement, is_cpu=is_cpu),
    }
    weights = sum(parts.values())
    if is_cpu:
        stages["converting frames"] = _frame_bytes(request)
    if placement.offload:
        # What works is on the device alone: the whole part, or a few of its layers.
        share = 1.0 if placement.offload == "model" else 0.05
        owners = {"encoding text": "text", "denoising": "transformer", "decoding": "vae"}
        for stage, owner in owners.items():
            held = [size for name, size in parts.items() if owner in name]
            stages[stage] += int(share * max(held, default=0))
        weights = 0
    return MemoryEstimate(weights, stages)


def check_memory(pipeline: Any, request: GenerationRequest) -> None:
    """Refuse a video that cannot fit beside a loaded pipeline.

    Decoding is traced, which takes a moment, only where what is counted without it is an eighth of
    what is free.

    Raises:
        ValueError: It takes more than what is free; the numbers are named.
    """
    device = getattr(pipeline, "_execution_device", pipeline.device)
    is_cpu = device.type == "cpu"
    dtype = denoisers(pipeline)[0].dtype
    stages = {"denoising": _denoising_bytes(pipeline, request, dtype, is_cpu=is_cpu)}
    if is_cpu:
        stages["converting frames"] = _frame_bytes(request)
    if max(stages.values()) > free_bytes(device) / 8:
        tiling = Placement(vae_tiling=bool(getattr(pipeline.vae, "use_tiling", False)))
        stages["decoding"] = _decoding_bytes(pipeline, request, dtype, tiling, is_cpu=is_cpu)
    refuse_too_large(MemoryEstimate(0, stages), request, device)


def refuse_too_large(
    estimate: MemoryEstimate, request: GenerationRequest, device: torch.device
) -> None:
    """Refuse a video that takes more memory than what is free.

    Raises:
        ValueError: It does; the numbers are named.
    """
    what = f"a video of {request.frames} frames of {request.width}x{request.height}"
    estimate.check(device, what, "Ask for fewer frames or pixels")


def check_encoding(pipeline: Any, frames: int, height: int, width: int) -> None:
    """Refuse a video that the VAE cannot encode in the memory that is free.

    Raises:
        ValueError: It takes more than that; the numbers are named.
    """
    device, kind = pipeline.vae.device, pipeline.vae.dtype
    video = frames * height * width * 3 * kind.itemsize
    if ENCODER_WIDTH * video < free_bytes(device) / 8:
        return
    shape = (1, 3, frames, height, width)
    try:
        traced = traced_peak(
            partial(_coder, pipeline.vae, shape, kind, "encode"), is_cpu=device.type == "cpu"
        )
    except Exception:  # code of a VAE that needs the data itself: the video is left
        traced = 2 * video
    what = f"encoding {frames} frames of {width}x{height}"
    estimate = MemoryEstimate(0, {"encoding": traced + video})
    estimate.check(device, what, "Pass --height, --width and --frames for less")


def _frame_bytes(request: GenerationRequest) -> int:
    return request.frames * request.height * request.width * 3 * FRAME_BYTES


def hollow_pipeline(directory: Path) -> Any:
    """A pipeline whose video parts have shapes and no data, and whose other parts are missing.

    Raises:
        ValueError: A part's configuration does not fit its class.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    index = read_model_index(directory)
    pipeline_class = find_class("diffusers", index["_class_name"], directory)
    made: dict[str, Any] = dict.fromkeys(named_parts(index))
    with FakeTensorMode():
        for name, entry in named_parts(index).items():
            if name == "vae" or name.startswith("transformer"):
                made[name] = _hollow_part(directory / name, entry)
    try:
        known = inspect.signature(pipeline_class.__init__).parameters
        plain = {name: index[name] for name in known if name in index and name not in made}
        plain = {name: value for name, value in plain.items() if not isinstance(value, list)}
        missing = {
            name: None
            for name, value in known.items()
            if value.default is inspect.Parameter.empty and name not in (*made, *plain, "self")
        }
        return pipeline_class(**{n: v for n, v in made.items() if n in known}, **plain, **missing)
    except Exception as error:
        raise ValueError(f"{directory}: not a whole pipeline ({first_line(error)}).") from error


def _hollow_part(folder: Path, entry: tuple[str, str]) -> Any:
    check_layers(folder)
    kind = find_class(*entry, folder)
    try:
        return kind.from_config(kind.load_config(folder)).eval()
    except Exception as error:
        raise ValueError(
            f"{folder}: its config does not make a {entry[1]} ({first_line(error)})."
        ) from error


def part_bytes(directory: Path, dtype: torch.dtype, quantize: str = "") -> dict[str, int]:
    """Bytes of each part's weights as they are loaded, from the headers of their files.

    Args:
        directory: The pipeline directory.
        dtype: Dtype of all but the VAE.
        quantize: The way in which the transformer takes fewer bits, as `Placement` has it.
    """
    index = read_model_index(directory)
    found = {}
    for name in named_parts(index):
        kind = dtype_of_vae(index["_class_name"], dtype) if name == "vae" else dtype
        size = sum(map(_numbers_in, (directory / name).glob("*.safetensors"))) * kind.itemsize
        if name.startswith("transformer") and quantize:
            share = QUANTIZED_SHARE.get(quantize)
            file = Path(quantize)
            size = int(size * share) if share else file.stat().st_size if file.is_file() else size
        if size:
            found[name] = size
    return found


def _numbers_in(file: Path) -> int:
    """Numbers of all tensors that the header of a safetensors file names."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as opened:
            return sum(prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    except (SafetensorError, OSError):
        return 0  # loading says what is wrong with it


def _text_bytes(directory: Path, dtype: torch.dtype) -> int:
    """A layer of the text encoder at 512 tokens, twice for guidance."""
    path = directory / "text_encoder" / "config.json"
    config = read_object(path) if path.is_file() else {}
    width = _size_in(config, path, "d_model", "hidden_size") or 0
    inner = _size_in(config, path, "d_ff", "intermediate_size") or 4 * width
    heads = _size_in(config, path, "num_heads", "num_attention_heads") or 0
    return 2 * 512 * (6 * width + 3 * inner + 2 * 512 * heads) * dtype.itemsize


def _size_in(config: dict[str, Any], path: Path, *names: str) -> int | None:
    """The size that a configuration gives under the first of the names that it has.

    Raises:
        ValueError: It is no whole number that a size can be.
    """
    for name in names:
        value = config.get(name)
        if value is not None:
            if type(value) is not int or not 0 <= value < MAX_SIZE:
                raise ValueError(f"{path}: {name} must be a whole number, got {value!r:.40}.")
            return value
    return None


def _denoising_bytes(
    pipeline: Any, request: GenerationRequest, dtype: torch.dtype, *, is_cpu: bool
) -> int:
    model = denoisers(pipeline)[0]
    config: Any = model.config
    heads = config.get("num_attention_heads") or 1
    width = config.get("model_dim") or heads * (config.get("attention_head_dim") or 1)
    heads = config.get("num_attention_heads") or max(1, width // 64)
    ffn = config.get("ffn_dim") or config.get("ff_dim") or 4 * width
    row = find_row(model)
    batch = 2 if row is not None and row.guidance_in_batch and request.guidance > 1 else 1
    grid = token_grid(pipeline, request.frames, request.height, request.width)
    tokens = prod(grid)
    sparse = 0
    if not request.is_dense:
        block = prod(parse(request.sparse_algo).block or (1, 8, 8))
        sparse = batch * sparse_bytes(tokens, width, heads, block, dtype.itemsize)
        sparse += 0 if is_cpu else GPU_SCRATCH
    total = activation_bytes(batch * tokens, width, ffn, heads, dtype.itemsize, sparse)
    # Solvers keep a few latents in float32 beside the current ones.
    latents = prod(_latent_shape(pipeline, request))
    return int(total) + 8 * latents * 4


def _latent_shape(pipeline: Any, request: GenerationRequest) -> tuple[int, int, int, int, int]:
    temporal, spatial = vae_strides(pipeline)
    config = pipeline.vae.config
    channels = config.get("z_dim") or config.get("latent_channels")
    frames = (request.frames - 1) // temporal + 1
    return 1, channels, frames, request.height // spatial, request.width // spatial


def _decoding_bytes(
    pipeline: Any,
    request: GenerationRequest,
    dtype: torch.dtype,
    placement: Placement,
    *,
    is_cpu: bool,
) -> int:
    kind = dtype_of_vae(type(pipeline).__name__, dtype)
    batch, channels, frames, height, width = _latent_shape(pipeline, request)
    _, spatial = vae_strides(pipeline)
    video = request.frames * request.height * request.width * 3 * kind.itemsize
    extra = 0.0
    if placement.vae_tiling:
        tile = TILE // spatial
        shown = (
            min(height, tile) * min(width, tile) * spatial**2 * request.frames * 3 * kind.itemsize
        )
        extra = TILED_VIDEOS * video - shown
        height, width = min(height, tile), min(width, tile)

    def peak(count: int) -> int:
        shape = (batch, channels, count, height, width)
        return traced_peak(partial(_coder, pipeline.vae, shape, kind, "decode"), is_cpu=is_cpu)

    try:
        # Frame after frame: each further one adds the same.
        if frames > CHUNKS[1] and hasattr(pipeline.vae, "clear_cache"):
            few, more = map(peak, CHUNKS)
            slope = (more - few) / (CHUNKS[1] - CHUNKS[0])
            traced = more + slope * (frames - CHUNKS[1])
        else:
            traced = peak(frames)
    except Exception:  # code of a VAE that needs the data itself: the video is left
        traced = 2 * video
    return int(traced + max(0.0, extra))


def _coder(vae: Any, shape: tuple[int, ...], dtype: torch.dtype, verb: str) -> Any:
    """The VAE's `encode` or `decode` of a tensor of a shape, all without data."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # tensors without data cannot be converted
    try:
        hollow = type(vae).from_config(vae.config).eval()
    finally:
        torch.set_default_dtype(usual)
    run = getattr(hollow, verb)
    known = inspect.signature(run).parameters
    options = {"temb": torch.empty(1)} if "temb" in known else {}
    return partial(run, torch.empty(shape, dtype=dtype), return_dict=False, **options)
