"""The node "NABLA Attention": a MODEL in, the same model with block-sparse self-attention out."""

import math
from dataclasses import replace
from typing import Any

from nabla_attn import Schedule, parse
from nabla_attn.config import TAILS

from .forward import Settings, make_wrapper
from .override import OVERRIDE, PREVIOUS, nabla_override

# Classes of ComfyUI's diffusion models; variants (VACE, Animate, ...) derive from them.
SUPPORTED = {"WanModel": "Wan", "Kandinsky5": "Kandinsky 5"}
_KEY = "nabla_attn"
AS_WRITTEN = "as in algorithm"


class NablaAttention:
    """Patches a clone of the model; the model that came in stays as it was."""

    CATEGORY = "model_patches"
    DESCRIPTION = "Block-sparse video self-attention for Wan and Kandinsky 5 (arXiv:2507.13546)."
    FUNCTION = "apply"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, tuple]]:
        """Return the inputs in ComfyUI's form: name -> (type, options)."""
        share = {"min": 0.0, "max": 1.0, "step": 0.001}
        count = {"max": 10_000_000, "step": 1}
        return {
            "required": {
                "model": ("MODEL",),
                "algorithm": ("STRING", {"default": "nabla-0.7"}),
                "start_percent": ("FLOAT", {"default": 0.0, **share}),
                "end_percent": ("FLOAT", {"default": 1.0, **share}),
                "dense_first_steps": ("INT", {"default": -1, "min": -1, **count}),
                "min_tokens": ("INT", {"default": 0, "min": 0, **count}),
                "keep_first_frame": ("BOOLEAN", {"default": False}),
            },
            "optional": {"tail": ([AS_WRITTEN, *TAILS], {"default": AS_WRITTEN})},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, algorithm: str | None = None) -> bool | str:
        """Return True or the fault of the algorithm; None is a linked input, not known yet."""
        try:
            if algorithm is not None:
                parse(algorithm)
        except ValueError as error:
            return str(error)
        return True

    def apply(
        self,
        model: Any,
        algorithm: str,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        dense_first_steps: int = -1,
        min_tokens: int = 0,
        keep_first_frame: bool = False,
        tail: str = AS_WRITTEN,
    ) -> tuple[Any]:
        """Return a patched clone; settings of an earlier patch are replaced.

        Args:
            model: ComfyUI's ModelPatcher of a Wan or Kandinsky 5 model.
            algorithm: Algorithm string such as "nabla-0.7" or "nabla-0.6_sta-11-3-3".
            start_percent: Share of the noise schedule at which sparse attention begins.
            end_percent: Share of the noise schedule at which it ends.
            dense_first_steps: Number of dense sampling steps at the start; -1 is the reference's
                choice, 12 for a window alone and 0 otherwise.
            min_tokens: Number of video tokens below which attention stays dense.
            keep_first_frame: Whether every block attends the first frame.
            tail: How dropped blocks are estimated, "mean" or "first"; `AS_WRITTEN` is the
                algorithm's own choice.

        Raises:
            ValueError: The algorithm or model is unknown, or the percents are out of order.
        """
        from comfy.patcher_extension import WrappersMP

        config = parse(algorithm)
        if keep_first_frame and not config.is_dense:
            config = replace(config, keep_first_frame=True)
        if tail != AS_WRITTEN and not config.is_dense:
            config = replace(config, tail=tail)
        schedule = Schedule.default(config)
        if dense_first_steps >= 0:
            schedule = replace(schedule, dense_first_steps=dense_first_steps)
        _check_model(model.get_model_object("diffusion_model"))
        start_sigma, end_sigma = _sigmas(model, start_percent, end_percent)
        settings = Settings(
            schedule=replace(schedule, min_tokens=min_tokens),
            start_sigma=start_sigma,
            end_sigma=end_sigma,
        )
        patched = model.clone()
        patched.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, _KEY)
        patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, _KEY, make_wrapper(settings))
        _set_override(patched)
        return (patched,)


def _check_model(diffusion_model: Any) -> None:
    # torch.compile hides the model's class behind its own.
    kind = type(getattr(diffusion_model, "_orig_mod", diffusion_model))
    if not any(base.__name__ in SUPPORTED for base in kind.__mro__):
        raise ValueError(
            f"NABLA Attention works on {' and '.join(SUPPORTED.values())} models: got "
            f"{kind.__name__}. Bypass the node for this model."
        )


def _sigmas(model: Any, start_percent: float, end_percent: float) -> tuple[float, float]:
    """Return the noise levels between which attention is sparse; infinite without a limit."""
    if not 0 <= start_percent <= end_percent <= 1:
        raise ValueError(
            "expected 0 <= start_percent <= end_percent <= 1: "
            f"got {start_percent} and {end_percent}."
        )
    to_sigma = model.get_model_object("model_sampling").percent_to_sigma
    start = math.inf if start_percent == 0 else float(to_sigma(start_percent))
    end = -math.inf if end_percent == 1 else float(to_sigma(end_percent))
    return start, end


def _set_override(patched: Any) -> None:
    # A copy, because clones may share the dict with the model that came in.
    options = dict(patched.model_options.get("transformer_options", {}))
    earlier = options.get(OVERRIDE)
    if earlier is not nabla_override:
        options[PREVIOUS] = earlier
    options[OVERRIDE] = nabla_override
    patched.model_options["transformer_options"] = options
