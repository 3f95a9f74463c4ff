"""The shipped rates of Ascend 310 against the ten published latencies."""

import numpy as np
import pytest
import torch

import isynet
from isynet.family import FAMILY, PUBLISHED
from isynet.peers import peer
from nabla_attn.cost.rates import ASCEND310, fit_rates


@pytest.fixture(scope="module")
def works():
    with torch.device("meta"):
        nets = [isynet.create(name) if name in FAMILY else peer(name) for name in PUBLISHED]
    return [isynet.count(net) for net in nets]


def test_shipped_rates_are_the_fit(works):
    seconds = [row.milliseconds / 1e3 for row in PUBLISHED.values()]
    terms = ("matrix", "moved", "kernels")
    fit = fit_rates("ascend310", works, seconds, list(PUBLISHED), terms=terms, tiles=[(16, 16)])
    for term in terms:
        assert getattr(ASCEND310, term) == pytest.approx(getattr(fit.rates, term), rel=0.005)
    # Each network is left out on its own: predicted within 7 %.
    assert np.abs(fit.errors).max() < 0.07
    assert fit.rates.error == pytest.approx(ASCEND310.error, abs=5e-4)


def test_mem_orders_the_published_networks(works):
    from scipy.stats import spearmanr

    mems = [ASCEND310.mem(work) for work in works]
    rates = [
        work.matrix / row.milliseconds for work, row in zip(works, PUBLISHED.values(), strict=True)
    ]
    assert spearmanr(mems, rates)[0] > 0.9
