"""Rates of a machine: fitted to seconds, held against what they have not seen."""

import json

import numpy as np
import pytest
from torch import nn

from nabla_attn.cost.count import count
from nabla_attn.cost.rates import ASCEND310, Rates, find_rates, fit_rates, rates_file


def works():
    rng = np.random.default_rng(0)
    for family in ("a", "b", "c", "d"):
        for _ in range(4):
            inner, outer, pixels = rng.integers(3, 80, 3)
            layers = [nn.Conv2d(int(inner), int(outer), 3), nn.ReLU()]
            layers += [nn.Conv2d(int(outer), int(outer), 1)] * int(rng.integers(0, 4))
            yield family, count(nn.Sequential(*layers), (1, int(inner), int(pixels), int(pixels)))


def test_a_fit_finds_the_rates_that_made_the_seconds():
    families, found = zip(*works(), strict=True)
    true = Rates("m", 1e-11, 2e-10, 3e-10, kernels=1e-5, tile_channels=8, tile_pixels=1, batch=4)
    fit = fit_rates("m", found, [true.seconds(work) for work in found], families, batch=4)
    assert (fit.rates.tile_channels, fit.rates.tile_pixels) == (8, 1)
    assert fit.rates.matrix == pytest.approx(true.matrix, rel=1e-6)
    assert fit.rates.kernels == pytest.approx(true.kernels, rel=1e-6)
    assert fit.rates.error < 1e-6 and np.abs(fit.errors).max() < 1e-6


def test_the_error_is_of_families_left_out():
    families, found = zip(*works(), strict=True)
    seconds = [
        1e-11 * work.matrix * (3 if name == "a" else 1)
        for name, work in zip(families, found, strict=True)
    ]
    fit = fit_rates("m", found, seconds, families, terms=("matrix",), tiles=[(1, 1)])
    own = np.array([name == "a" for name in families])
    # Nothing of family a was seen when it was predicted.
    np.testing.assert_allclose(fit.errors[own], -2 / 3, rtol=1e-6)


def test_what_cannot_be_fitted_is_said():
    families, found = zip(*works(), strict=True)
    with pytest.raises(ValueError, match="two families"):
        fit_rates("m", found, [1.0] * len(found), ["a"] * len(found))
    with pytest.raises(ValueError, match="positive seconds"):
        fit_rates("m", found, [0.0] * len(found), families)
    with pytest.raises(ValueError, match="as many"):
        fit_rates("m", found, [1.0], families)


def test_mem_is_the_share_of_useful_matrix_time():
    _, work = next(works())
    perfect = Rates("m", 1e-11, tile_channels=1, tile_pixels=1)
    assert perfect.mem(work) == pytest.approx(1)
    assert 0 < ASCEND310.mem(work) < 1
    assert ASCEND310.seconds(work, batch=1) > ASCEND310.seconds(work, batch=64)


def test_rates_are_kept_as_json(tmp_path, monkeypatch):
    monkeypatch.setenv("NABLA_ATTN_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="isynet measure"):
        find_rates("here")
    rates = Rates("here", 1e-11, 2e-10)
    rates.save(rates_file())
    assert find_rates("here") == rates == find_rates(str(rates_file()))
    assert find_rates("ascend310") is ASCEND310
    with pytest.raises(ValueError, match=r"abacus.*ascend310"):
        find_rates("abacus")


@pytest.mark.parametrize(
    "change",
    [{"matrix": -1}, {"matrix": "fast"}, {"colour": 1}, {"tile_pixels": 0}, {"moved": None}],
)
def test_damaged_rates_are_named(change, tmp_path):
    file = tmp_path / "rates.json"
    file.write_text(json.dumps({"name": "m", "matrix": 1e-11} | change))
    with pytest.raises(ValueError, match=r"rates\.json"):
        Rates.load(file)
