"""Wall seconds of a pipeline call by stage, read from hooks on its own modules."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nabla_attn.progress import ProgressCallback, ignore_progress
from nabla_attn.sizes import denoisers


class StageClock:
    """Times text, transformer per step, and decode of one pipeline call.

    Text is everything before the first transformer call, decode everything after the last step; in
    between only the transformer's own calls count.

    Args:
        device: The device on which the pipeline runs; a GPU is waited for at each reading.
        num_steps: Number of denoising steps of the call.
        on_progress: Called at every stage and step.
    """

    def __init__(
        self,
        device: torch.device,
        num_steps: int,
        on_progress: ProgressCallback = ignore_progress,
    ) -> None:
        self._device = device
        self._num_steps = num_steps
        self._on_progress = on_progress
        self._begin = self._call_start = self._last_step = 0.0
        self._step_seconds = 0.0
        self._text: float | None = None
        self.transformer_steps: list[float] = []

    @contextmanager
    def watch(self, pipeline: Any) -> Iterator["StageClock"]:
        """Hook the pipeline's transformers for the time of the block."""
        hooks = []
        for module in denoisers(pipeline):
            hooks.append(module.register_forward_pre_hook(self._before_call))
            hooks.append(module.register_forward_hook(self._after_call))
        self._begin = self._read()
        self._on_progress("text", 0, 1)
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def on_step_end(self, pipeline: Any, step: int, timestep: Any, tensors: dict) -> dict:
        """diffusers' `callback_on_step_end`."""
        self.transformer_steps.append(self._step_seconds)
        self._step_seconds = 0.0
        self._last_step = self._read()
        self._on_progress("denoise", step + 1, self._num_steps)
        if step + 1 == self._num_steps:
            self._on_progress("decode", 0, 1)
        return tensors

    def seconds(self) -> dict[str, Any]:
        """Seconds by stage; call it once the pipeline has returned."""
        end = self._read()
        self._on_progress("done", 1, 1)
        return {
            "text": round(self._text or 0.0, 4),
            "transformer": round(sum(self.transformer_steps), 4),
            "transformer_steps": [round(step, 4) for step in self.transformer_steps],
            "decode": round(end - self._last_step, 4),
            "total": round(end - self._begin, 4),
        }

    def _before_call(self, module: Any, inputs: Any) -> None:
        self._call_start = self._read()
        if self._text is None:
            self._text = self._call_start - self._begin
            self._on_progress("denoise", 0, self._num_steps)

    def _after_call(self, module: Any, inputs: Any, output: Any) -> None:
        self._step_seconds += self._read() - self._call_start

    def _read(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
