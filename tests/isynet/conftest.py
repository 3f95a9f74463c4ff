"""What these tests share."""

from functools import partial

import pytest

from nabla_attn.cost.timing import time_loops


@pytest.fixture(autouse=True, scope="session")
def _quick_timings():
    """What is done with timings is tested here, and not how exact they are."""
    with pytest.MonkeyPatch.context() as patch:
        quick = partial(time_loops, max_rounds=2, loop_seconds=1e-4)
        patch.setattr("isynet.latency.time_loops", quick)
        yield
