"""The attention override: NABLA for the video's self-attention, the original for all else."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nabla_attn import TokenGrid, nabla_attention

from .forward import BLOCK_INDEX, CALL, GRID_SIZES, VideoCall

OVERRIDE = "optimized_attention_override"
PREVIOUS = "nabla_attn_previous"


@dataclass(frozen=True)
class _Request:
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float | None
    keeps_heads: bool


def nabla_override(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Called by ComfyUI in place of `func(q, k, v, heads, ...)`, its attention function.

    q, k and v are [batch, tokens, heads * dim], or [batch, heads, tokens, dim] with
    `skip_reshape`; the output is [batch, tokens, heads * dim], or [batch, heads, tokens, dim] with
    `skip_output_reshape` (ComfyUI comfy/ldm/modules/attention.py).

    Calls that are not the video's self-attention go to the override that the model had before, or
    to `func`.
    """
    options = kwargs.get("transformer_options") or {}
    call = options.get(CALL)
    # Blocks of text (Kandinsky 5) run before the first video block writes its index.
    if call is not None and BLOCK_INDEX in options:
        request = _read(*args, **kwargs)
        grid = _fit(request, call, options.get(GRID_SIZES))
        if grid is not None:
            return _attend(request, grid, call)
    previous = options.get(PREVIOUS)
    return func(*args, **kwargs) if previous is None else previous(func, *args, **kwargs)


def _read(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: Any = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    scale: float | None = None,
    **_: Any,
) -> _Request:
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return _Request(q, k, v, mask, scale, skip_output_reshape)


def _fit(request: _Request, call: VideoCall, grid_sizes: Any) -> TokenGrid | None:
    """Return the grid of a self-attention call; None for other calls and where it does not fit."""
    if not request.q.shape == request.k.shape == request.v.shape:
        return None
    # Wan's own sizes count frames that the model added to the latents.
    grid = call.grid if grid_sizes is None else TokenGrid(*(int(size) for size in grid_sizes))
    tokens = request.q.shape[2]
    if tokens == grid.num_tokens + call.reference_frames * grid.height * grid.width:
        grid = TokenGrid(grid.frames + call.reference_frames, grid.height, grid.width)
    elif tokens != grid.num_tokens:
        call.tell(f"{tokens} tokens do not fit the token grid {grid}")
        return None
    if request.mask is not None:
        call.tell("the model gave it a mask")
        return None
    if tokens == call.text_tokens:
        call.tell(f"text and video have the same length ({tokens} tokens) and cannot be told apart")
        return None
    return grid


def _attend(request: _Request, grid: TokenGrid, call: VideoCall) -> Tensor:
    call.num_sparse += 1
    q, k, v = request.q, request.k, request.v
    out = nabla_attention(q, k, v, grid, call.config, scale=request.scale)
    return out if request.keeps_heads else out.transpose(1, 2).flatten(2)
