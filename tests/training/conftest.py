"""What many runs of these tests share."""

import pytest
import torch
from torch.utils._pytree import tree_map_only

from nabla_attn.training import memory, train


@pytest.fixture(autouse=True, scope="session")
def _short_runs():
    """Draw no charts, and trace each kind of step once: both take longer than a tiny training."""
    traced, trace = {}, memory._step_bytes

    def known(run, *, is_cpu):
        batch, _ = run.loader.largest()
        sizes = tree_map_only(torch.Tensor, lambda value: (value.shape, value.dtype), batch)
        step = (run.config.precision, run.config.gradient_checkpointing, run.config.objective)
        key = str((type(run.bare), run.bare.config, step, sizes, is_cpu))
        if key not in traced:
            traced[key] = trace(run, is_cpu=is_cpu)
        return traced[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "_step_bytes", known)
        patch.setattr(train, "draw_losses", lambda *_: None)
        yield
