"""The least memory that a video takes, against what the machine has, before the work."""

from typing import Any

import torch

from nabla_attn.core.grid import BlockShape, TokenGrid
from nabla_attn.generation.request import GenerationRequest, video_tokens
from nabla_attn.sizes import denoisers

# Of each token at the same time: what a block adds to, queries, keys, values, and their output.
TENSORS_AT_ONCE = 5
# Of each number of the video: floats of the VAE, floats of the pipeline, and a byte of the frames.
VIDEO_BYTES = 4 + 4 + 1


def least_memory(pipeline: Any, request: GenerationRequest) -> dict[str, int]:
    """Bytes that a video takes at least, beside the loaded weights.

    A lower bound: libraries, the VAE's own layers and the allocator take more.

    Args:
        pipeline: A loaded pipeline of diffusers.
        request: The video to make.

    Returns:
        Bytes of "attention" (the tokens in one transformer block, and their map) and "video" (the
        decoded frames). They are not held at the same time.
    """
    model, config = denoisers(pipeline)[0], denoisers(pipeline)[0].config
    grid = TokenGrid(*video_tokens(pipeline, request), block=BlockShape())
    heads = getattr(config, "num_attention_heads", None) or 0
    width = heads * (getattr(config, "attention_head_dim", None) or 0)
    tokens = grid.num_tokens * width * TENSORS_AT_ONCE * model.dtype.itemsize
    blocks = 0 if request.is_dense else heads * grid.num_blocks**2
    video = request.frames * request.height * request.width * 3 * VIDEO_BYTES
    return {"attention": tokens + blocks, "video": video}


def check_memory(pipeline: Any, request: GenerationRequest) -> None:
    """Refuse a video that cannot fit, instead of being killed by the system in the middle.

    Args:
        pipeline: A loaded pipeline of diffusers.
        request: The video to make.

    Raises:
        ValueError: The least it takes is more than what is free; the numbers are named.
    """
    device = getattr(pipeline, "_execution_device", pipeline.device)
    free = {"cpu": _free(torch.device("cpu")), device.type: _free(device)}
    needed = least_memory(pipeline, request)
    # The frames end in the memory of the CPU, whatever made them.
    for name, place in (("attention", device.type), ("video", "cpu")):
        if needed[name] > free[place]:
            raise ValueError(
                f"{request.frames} frames of {request.width}x{request.height} take at least "
                f"{_gib(needed[name])} for the {name}, and {_gib(free[place])} are free on the "
                f"{place}. Ask for fewer frames or pixels, or pass --force to try."
            )


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
