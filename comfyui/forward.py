"""What one forward of the diffusion model tells the attention override: grid and algorithm.

ComfyUI hands the override no grid, so a wrapper around the forward reads it from the latents. It
travels in the forward's own copy of `transformer_options`; nothing is kept on modules or classes.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from nabla_attn import Schedule, SparseConfig, TokenGrid

CALL = "nabla_attn_call"
# Written by ComfyUI's models, and left over where an earlier forward wrote to the same dict.
BLOCK_INDEX, GRID_SIZES = "block_index", "grid_sizes"
_LOG = logging.getLogger("nabla_attn.comfyui")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of one patched model.

    Args:
        schedule: The algorithm of each step.
        start_sigma: Highest noise level with sparse attention.
        end_sigma: Noise level at which attention is dense again.
    """

    schedule: Schedule
    start_sigma: float = math.inf
    end_sigma: float = -math.inf


@dataclass(kw_only=True)
class VideoCall:
    """What the override needs to know during one forward.

    Args:
        grid: Token grid of the latents.
        config: The algorithm of this step; never dense.
        reference_frames: Number of frames of a reference latent that the model may put beside the
            video.
        text_tokens: Length of the text that cross-attention attends.
        told: Reasons that were logged before.
        num_sparse: Number of sparse attention calls so far.
    """

    grid: TokenGrid
    config: SparseConfig
    reference_frames: int
    text_tokens: int
    told: set[str] = field(default_factory=set)
    num_sparse: int = 0

    def tell(self, reason: str) -> None:
        """Log once per patched model why self-attention stayed dense."""
        if reason not in self.told:
            self.told.add(reason)
            _LOG.warning("NABLA: attention stays dense, because %s.", reason)


def make_wrapper(settings: Settings) -> Callable[..., Any]:
    """Return a wrapper for ComfyUI's `WrappersMP.DIFFUSION_MODEL` that logs each reason once."""
    told: set[str] = set()

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs, options = _own_options(args, kwargs)
        call = _plan(settings, executor.class_obj, args, kwargs, options)
        if call is None:
            return executor(*args, **kwargs)
        call.told = told
        options[CALL] = call
        out = executor(*args, **kwargs)
        if not call.num_sparse and not told:
            call.tell(f"no self-attention of {type(executor.class_obj).__name__} asked for it")
        return out

    return wrapper


def _own_options(args: tuple, kwargs: dict) -> tuple[tuple, dict, dict]:
    """Return the arguments with a copy of `transformer_options`, which Wan passes by position."""
    if "transformer_options" in kwargs:
        options = _fresh(kwargs["transformer_options"])
        return args, {**kwargs, "transformer_options": options}, options
    for index, value in enumerate(args):
        if isinstance(value, dict):
            options = _fresh(value)
            return (*args[:index], options, *args[index + 1 :]), kwargs, options
    raise RuntimeError(
        "NABLA Attention found no transformer_options in the model's forward; this version of "
        "ComfyUI is not supported. Bypass the node."
    )


def _fresh(options: dict) -> dict:
    return {key: value for key, value in options.items() if key not in (BLOCK_INDEX, GRID_SIZES)}


def _plan(
    settings: Settings, model: Any, args: tuple, kwargs: dict, options: dict
) -> VideoCall | None:
    """Return the call of this forward, or None where the settings make it dense."""
    if not _is_between(settings, options):
        return None
    grid = token_grid(args[0].shape, model.patch_size)
    step = _step(options) if settings.schedule.dense_first_steps else 0
    config = settings.schedule.config_for(step, 0, num_tokens=grid.num_tokens)
    if config.is_dense:
        return None
    text = args[2] if len(args) > 2 else kwargs.get("context")
    return VideoCall(
        grid=grid,
        config=config,
        reference_frames=_reference_frames(kwargs.get("reference_latent")),
        text_tokens=0 if text is None else text.shape[1],
    )


def token_grid(shape: tuple[int, ...], patch_size: tuple[int, int, int]) -> TokenGrid:
    """Return the token grid of latents [batch, channels, (frames,) height, width], edges padded."""
    sizes = (1, *shape[2:]) if len(shape) == 4 else shape[2:]
    return TokenGrid(*(-(-size // patch) for size, patch in zip(sizes, patch_size, strict=True)))


def _reference_frames(latent: Tensor | None) -> int:
    if latent is None:
        return 0
    return latent.shape[2] if latent.dim() == 5 else 1


def _is_between(settings: Settings, options: dict) -> bool:
    if settings.start_sigma == math.inf and settings.end_sigma == -math.inf:
        return True
    return settings.end_sigma < _sigma(options) <= settings.start_sigma


def _step(options: dict) -> int:
    """Return the sampling step, from 0; a second evaluation of a step counts as the first."""
    schedule = options.get("sample_sigmas")
    if schedule is None:
        raise ValueError(
            "dense_first_steps needs sample_sigmas, which this sampler does not give. Set it to 0 "
            "and use start_percent."
        )
    return max(int((schedule >= _sigma(options) * (1 - 1e-5)).sum()) - 1, 0)


def _sigma(options: dict) -> float:
    sigmas = options.get("sigmas")
    if sigmas is None:
        raise ValueError(
            "the noise level is not known, because this sampler gives no sigmas. Use "
            "start_percent 0, end_percent 1 and dense_first_steps 0."
        )
    return float(sigmas.max())
