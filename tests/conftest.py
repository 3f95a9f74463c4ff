"""Shape checks on every core call, and fixed seeds."""

import gc
import sys

import pytest
import tests.type_rules  # noqa: F401  the hook looks it up by name
import torch
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

ROOMS = ("cells", "estimates", "exact", "order", "scores", "select", "token_orders", "window")
install_import_hook(
    [
        # block_map is traced by torch.compile, which cannot see through the checks.
        *(f"nabla_attn.core.{room}" for room in ROOMS),
        "nabla_attn.attention",
        "nabla_attn.backends.reference",
    ],
    "tests.type_rules.check_types",
)

from nabla_attn import fusion  # noqa: E402

# The checks cannot be traced: what is compiled is tested in processes of their own.
fusion.MIN_ELEMENTS = sys.maxsize

# Nothing is timed in tests: machines that run them are shared.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_collection_finish():
    """Spare the garbage collector the modules and tests, which stay, and most of its rounds."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(7000)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _one_estimate_a_size():
    """Trace how much memory decoding takes once a size: that takes longer than a tiny video."""
    from nabla_attn.generation import memory

    traced, trace = {}, memory._decoding_bytes

    def known(pipeline, request, dtype, placement, *, is_cpu):
        size = (request.frames, request.height, request.width)
        size += tuple(memory._latent_shape(pipeline, request))
        key = str((type(pipeline), pipeline.vae.config, size, dtype, placement, is_cpu))
        if key not in traced:
            traced[key] = trace(pipeline, request, dtype, placement, is_cpu=is_cpu)
        return traced[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "_decoding_bytes", known)
        yield


@pytest.fixture(scope="session")
def golden():
    """Load a file of recorded reference outputs; see tests/golden/README.md."""
    from pathlib import Path

    import numpy as np

    return lambda name: np.load(Path(__file__).parent / "golden" / name)


@pytest.fixture(scope="session")
def tiny_wan(tmp_path_factory):
    """A random Wan pipeline directory; copy it before changing it."""
    from tests.tiny_diffusers import tiny_wan_pipeline

    return tiny_wan_pipeline(tmp_path_factory.mktemp("tiny_wan"))
