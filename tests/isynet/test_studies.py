"""Studies: made of records, honest about what was seen, and gone on with after an end."""

import numpy as np
import pytest
import torch
from tests.isynet.test_space_and_latency import CountingTimer

import isynet
from isynet.comparison import ADAPTED, study_peers, study_scaling
from isynet.data.catalogue import open_objects, open_source
from isynet.downstream import DownstreamData, DownstreamPlan, study_downstream
from isynet.growth import Scaled
from isynet.latency import Conditions, LatencyTable
from isynet.measuring import measure_networks, study
from isynet.space import SearchSpace
from isynet.studies import study_table
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
    monkeypatch.setattr("isynet.comparison.WIDTHS", (8, 16))
    monkeypatch.setattr("isynet.comparison.ADAPTED", {"resnet8": ADAPTED["resnet8"]})
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


def test_scaled_and_evenly_deepened_networks_are_paired(tmp_path):
    train, test = open_source("shapes", "train", 16), open_source("shapes", "test", 16)
    table = LatencyTable(Conditions(16, num_classes=18), CountingTimer(), factor=1.0)
    base = isynet.parse("1x3 1x3,3+ h0")
    grown = isynet.parse("1x3 3x3,3+ h0")
    budget = table.seconds(grown)

    def run(seeds=2):
        return study_scaling(
            base, [Scaled(grown, budget, budget, 1.0)], train, test, table, folder=tmp_path,
            recipe=Recipe(steps=3, batch=8, warmup=0, augment=0), seeds=seeds,
        )  # fmt: skip

    (row,) = run()
    assert row["scaled"]["architecture"] == str(grown)
    assert row["even"]["predicted"] <= budget == row["scaled"]["predicted"]
    ahead = row["scaled"]["accuracy"] - row["even"]["accuracy"]
    assert row["ahead"] == pytest.approx(ahead) and row["ahead_error"] >= 0
    assert run() == [row]
    with pytest.raises(ValueError, match="another seeds"):
        run(seeds=1)


def test_features_are_compared_at_classes_few_images_and_boxes(tmp_path, monkeypatch):
    pytest.importorskip("pycocotools")
    monkeypatch.setattr("isynet.comparison.WIDTHS", (8,))
    train, test = open_source("shapes", "train", 16), open_source("shapes", "test", 16)
    boxes = open_objects("shapes", "train", 32), open_objects("shapes", "test", 32)
    few = [open_source("digits", split, 16, grey_channels=3) for split in ("train", "test")]
    table = LatencyTable(Conditions(16, num_classes=18), CountingTimer())
    ours = isynet.parse("1x3 1x3 2x3,3+ h0")
    recipe = Recipe(steps=3, batch=8, warmup=0, augment=0)
    plan = DownstreamPlan(recipe, recipe, recipe, shots=2, test_images=8, seeds=2)

    def run(families=("resnet8",)):
        return study_downstream(
            [ours], DownstreamData(train, test, *few, *boxes), table, latency=1.0,
            families=families, folder=tmp_path, plan=plan,
        )  # fmt: skip

    own, other = run()
    assert (own["network"], other["network"]) == (str(ours), "resnet8 8")
    for name in ("accuracy", "transfer", "ap50"):
        assert own["ahead"][name]["over"] == "resnet8 8"
        assert own["ahead"][name]["mean"] == pytest.approx(own[name] - other[name])
        assert len(own["seeds"][name]) == 2 and own["ahead"][name]["error"] >= 0
    assert run() == [own, other]
    with pytest.raises(ValueError, match="another families"):
        run(families=("regnet",))
    grey = [open_source("digits", split, 16) for split in ("train", "test")]
    with pytest.raises(ValueError, match="3 channels as the training images: got 1"):
        study_downstream(
            [ours], DownstreamData(train, test, *grey, *boxes), table, latency=1.0,
            families=["resnet8"], folder=tmp_path / "y", plan=plan,
        )  # fmt: skip
    with pytest.raises(ValueError, match="unknown family"):
        study_downstream(
            [ours], DownstreamData(train, test, *few, *boxes), table, latency=1.0,
            families=["alexnet"], folder=tmp_path / "x", plan=plan,
        )  # fmt: skip


@pytest.mark.parametrize("name", ADAPTED)
def test_networks_of_others_have_stages(name):
    from isynet.network import FeatureMaps, Staged

    net = ADAPTED[name](16, 7)
    backbone = FeatureMaps(Staged(net), (-3, -2, -1), as_list=True)
    maps = backbone.train()(torch.zeros(2, 3, 48, 32))
    assert [x.shape[1] for x in maps] == list(backbone.channels)
    assert [48 // x.shape[2] for x in maps] == list(backbone.reductions)
    assert list(backbone.reductions) == sorted(set(backbone.reductions))
