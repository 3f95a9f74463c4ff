"""The reference's two samplers, by diffusers' schedulers with its noise levels."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

NUM_TRAIN_TIMESTEPS = 1000
SOLVERS = ("unipc", "dpm++")


def flow_sigmas(num_steps: int, shift: float, first: float) -> np.ndarray:
    """Noise levels of ``num_steps`` steps in float64, without the final zero.

    Args:
        num_steps: steps.
        shift: larger spends more steps at high noise.
        first: level before shifting: 0.999 for UniPC, 1 for DPM++ (Wan2.1
            wan/utils/fm_solvers_unipc.py and fm_solvers.py).
    """
    if num_steps < 1:
        raise ValueError(f"sampling needs at least one step, got {num_steps}.")
    if not shift > 0:
        raise ValueError(f"shift must be positive, got {shift}.")
    sigmas = np.linspace(first, 0, num_steps + 1)[:-1]
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def build_solver(solver: str, shift: float) -> "SchedulerMixin":
    """The scheduler ``solver`` (``"unipc"`` or ``"dpm++"``), as the reference runs it.

    Raises:
        ValueError: unknown solver, or shift not positive.
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}. Known: {', '.join(SOLVERS)}.")
    flow_sigmas(1, shift, 1.0)
    common: dict[str, Any] = {
        "num_train_timesteps": NUM_TRAIN_TIMESTEPS,
        "solver_order": 2,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": shift,
    }
    if solver == "unipc":
        return _unipc_class()(solver_type="bh2", **common)
    return _dpm_class()(algorithm_type="dpmsolver++", solver_type="midpoint", **common)


def _unipc_class() -> type:
    from diffusers import UniPCMultistepScheduler

    class WanUniPCScheduler(UniPCMultistepScheduler):
        """UniPC whose noise levels start at 0.999 before shifting; diffusers starts at 1."""

        def set_timesteps(self, num_inference_steps: int, device: Any = None, **_: Any) -> None:
            """Set the timesteps of ``num_inference_steps`` steps."""
            super().set_timesteps(num_inference_steps, device=device)  # type: ignore[misc]
            _set_levels(self, num_inference_steps, device, 0.999)

    return WanUniPCScheduler


def _dpm_class() -> type:
    from diffusers import DPMSolverMultistepScheduler

    class WanDPMScheduler(DPMSolverMultistepScheduler):
        """DPM++ whose noise levels run from 1 to 0; diffusers starts at 0.999 and takes no own."""

        def set_timesteps(self, num_inference_steps: int, device: Any = None, **_: Any) -> None:
            """Set the timesteps of ``num_inference_steps`` steps."""
            super().set_timesteps(num_inference_steps, device=device)  # type: ignore[misc]
            _set_levels(self, num_inference_steps, device, 1.0)

    return WanDPMScheduler


def _set_levels(scheduler: Any, num_steps: int, device: Any, first: float) -> None:
    """Put the reference's levels in; timesteps are 1000 sigma in float64, truncated."""
    sigmas = flow_sigmas(num_steps, scheduler.config.flow_shift, first)
    timesteps = (sigmas * NUM_TRAIN_TIMESTEPS).astype(np.int64)
    scheduler.timesteps = torch.from_numpy(timesteps).to(device)
    scheduler.sigmas = torch.from_numpy(np.append(sigmas, 0.0).astype(np.float32))
