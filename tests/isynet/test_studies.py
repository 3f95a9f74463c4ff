"""Studies: made of records, honest about what was seen, and gone on with after an end."""

import numpy as np
import pytest
import torch
from tests.isynet.test_space_and_latency import CountingTimer

import isynet
from isynet.data.catalogue import open_source
from isynet.latency import Conditions, LatencyTable
from isynet.measuring import measure_networks, study
from isynet.space import SearchSpace
from isynet.studies import ADAPTED, study_peers, study_table
from isynet.training.recipe import Recipe
from nabla_attn.cost.rates import Rates
from nabla_attn.record import RunRecord

MACHINE = Rates("m", 1e-9, 1e-9, 2e-9, kernels=1e-4, tile_channels=8, tile_pixels=1, batch=2)


def test_predicted_latencies_of_unseen_networks(tmp_path):
    table = LatencyTable(Conditions(24), CountingTimer(), tmp_path / "latency.json")
    space = SearchSpace(max_blocks=2, max_edges=2)
    result = study_table(space, table, folder=tmp_path, count=5)
    assert result["max_error"] < 0.03 and result["spearman"] > 0.99
    # From the records and the table alone, nothing is measured again.
    again = LatencyTable(Conditions(24), None, tmp_path / "latency.json")
    again.timer = None
    assert study_table(space, again, folder=tmp_path, count=5) == result


def test_networks_are_measured_once_and_rates_fitted(tmp_path):
    names = ("isynet-n0", "isynet-n1", "resnet18", "mobilenet-v2", "squeezenet", "regnetx-002")
    timer = CountingTimer(MACHINE)
    measured = measure_networks(names, folder=tmp_path, size=64, batch=2, timer=timer)
    assert {each.family for each in measured} == {
        "isynet", "resnet", "mobilenet", "squeezenet", "regnetx"
    }  # fmt: skip
    calls = timer.calls
    again = measure_networks(names, folder=tmp_path, size=64, batch=2, timer=timer)
    assert timer.calls == calls and [a.seconds for a in again] == [m.seconds for m in measured]
    result = study(measured, "m", batch=2, source="test")
    assert result.rates.error < 0.1 and result.timed_spearman > 0.8
    assert all(0 < row["timed_mem"] < 1.2 for row in result.rows)
    with pytest.raises(ValueError, match="another size"):
        measure_networks(names, folder=tmp_path, size=32, batch=2, timer=timer)


@pytest.mark.parametrize("name", ADAPTED)
@pytest.mark.parametrize("width", [8, 128])
def test_adapted_networks_of_others_run_on_small_images(name, width):
    with torch.device("meta"):
        net = ADAPTED[name](width, 7).eval()
        assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_peers_of_equal_latency_are_trained_alike(tmp_path, monkeypatch):
    monkeypatch.setattr("isynet.studies.WIDTHS", (8, 16))
    monkeypatch.setattr("isynet.studies.ADAPTED", {"resnet8": ADAPTED["resnet8"]})
    train, test = open_source("shapes", "train", 16), open_source("shapes", "test", 16)
    table = LatencyTable(Conditions(16, num_classes=18), CountingTimer())
    ours = isynet.parse("1x3 2x3,3+ h0")
    recipe = Recipe(steps=4, batch=8, warmup=0, augment=0)
    limits = [table.measure_module(ADAPTED["resnet8"](width, 18).eval()) for width in (8, 16)]
    latency = max(table.measure(ours), sum(limits) / 2)

    def run(**options):
        return study_peers(
            [ours], train, test, table, latency=latency, folder=tmp_path, recipe=recipe, seeds=2,
            **options,
        )  # fmt: skip

    rows = {row["network"]: row for row in run()}
    width = 16 if limits[1] <= latency * 1.03 else 8
    assert set(rows) == {str(ours), f"resnet8 {width}"}
    own, other = rows[str(ours)], rows[f"resnet8 {width}"]
    assert own["ahead"] == pytest.approx(own["accuracy"] - other["accuracy"])
    assert own["ahead_error"] >= 0 and "ahead" not in other
    assert own["accuracy"] == pytest.approx(np.mean(own["accuracies"]))
    assert {row["network"]: row for row in run()} == rows
    assert RunRecord.load(tmp_path / "bench.json").numbers["rows"][0]["network"] in rows
    with pytest.raises(ValueError, match="another tolerance"):
        run(tolerance=0.5)
