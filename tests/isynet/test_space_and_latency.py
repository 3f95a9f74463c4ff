"""Search spaces, and latencies summed from measured blocks."""

import json
import random

import pytest

import isynet
from isynet.latency import Conditions, LatencyTable, make_timer
from isynet.space import SearchSpace
from nabla_attn.cost.count import count
from nabla_attn.cost.rates import ASCEND310, Rates

SPACE = SearchSpace(max_blocks=3, max_edges=3, heads=(0, 64))


class CountingTimer:
    """Seconds from counted work: the same every time, and additive."""

    def __init__(self, rates=None):
        self.rates, self.calls = rates or Rates("m", 1e-9, 1e-8, kernels=1e-4), 0

    def __call__(self, modules, shape):
        self.calls += 1
        return {
            name: self.rates.seconds(count(module, shape), batch=1)
            for name, module in modules.items()
        }


def test_what_is_drawn_belongs_to_the_space():
    rng = random.Random(0)
    for _ in range(200):
        architecture = SPACE.sample(rng)
        for each in (architecture, SPACE.mutate(architecture, rng)):
            assert len(each.stages) in SPACE.stages and each.head_width in SPACE.heads
            for stage in each.stages:
                assert set(stage.edges) <= set(SPACE.edges)
                assert len(stage.edges) <= 3 and stage.num_blocks <= 3
                assert stage.width_log2 in SPACE.widths and stage.expansion in SPACE.expansions
                assert stage.edges[0] != "1"
            assert isynet.parse(str(each)) == each


def test_draws_follow_the_seed_and_changes_change():
    first = [SPACE.sample(random.Random(seed)) for seed in (1, 1, 2)]
    assert first[0] == first[1] != first[2]
    rng = random.Random(0)
    assert all(SPACE.mutate(first[0], rng) != first[0] for _ in range(100))


def test_spaces_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="edges"):
        SearchSpace(edges=())
    with pytest.raises(ValueError, match="unknown edge"):
        SearchSpace(edges=("4",))
    with pytest.raises(ValueError, match="stages"):
        SearchSpace(stages=(9,))


def test_the_depthwise_twin_has_less_mem():
    twin = SPACE.twin()
    assert twin.edges == ("1", "3d", "5d")
    own, other = SPACE.mem(12, size=64), twin.mem(12, size=64)
    assert other.mean < own.mean / 2
    assert own.quantile(0.1) <= own.mean <= own.quantile(1)
    assert all(0 < value < 1 for value in SPACE.mem(5, size=64, rates=ASCEND310).values)
    # The first convolution sees three channels and stays one.
    rng = random.Random(0)
    assert all(twin.sample(rng).stages[0].edges[0] in ("3", "5") for _ in range(20))


@pytest.mark.parametrize("text", ["1x5 3x3,1+ 2x3s,3+le2 h64", "3x3,5+w1 1x3d h0", "4x3,3+"])
def test_blocks_add_up_to_the_network(text):
    architecture = isynet.parse(text)
    table = LatencyTable(Conditions(48), CountingTimer())
    assert table.seconds(architecture) == pytest.approx(table.measure(architecture), rel=0.02)


def test_one_more_block_costs_what_the_table_says():
    table = LatencyTable(Conditions(32), CountingTimer())
    small, large = isynet.parse("1x3 2x3,1+ h0"), isynet.parse("1x3 5x3,1+ h0")
    _, (_, more) = table.pieces(small)
    measured = table.measure(large) - table.measure(small)
    assert 3 * more == pytest.approx(measured, rel=1e-6)


def test_entries_are_measured_once_and_kept(tmp_path):
    timer, file = CountingTimer(), tmp_path / "table.json"
    table = LatencyTable(Conditions(32), timer, file)
    architecture = isynet.parse("1x3 2x3,1+ 1x5 h0")
    first, calls = table.seconds(architecture), timer.calls
    assert table.seconds(architecture.with_blocks((4, 1, 3))) > first
    assert timer.calls == calls
    errors = table.fit_factor([architecture, isynet.parse("1x3 1x3 h0")])
    assert max(map(abs, errors)) < 0.02
    again = LatencyTable(Conditions(32), None, file)
    assert again.entries == table.entries and again.factor == table.factor
    again.timer = None
    assert again.seconds(architecture) == table.seconds(architecture)


def test_tables_of_other_conditions_and_damaged_ones_are_refused(tmp_path):
    file = tmp_path / "table.json"
    LatencyTable(Conditions(32), CountingTimer(), file).seconds(isynet.parse("1x3 h0"))
    with pytest.raises(ValueError, match="another size"):
        LatencyTable(Conditions(64), CountingTimer(), file)
    for change in (
        {"format": 9},
        {"entries": 3},
        {"factor": "x"},
        {"factor": []},
        {"entries": {"a": None}},
        {"entries": {"a": "1"}},
        {"entries": {"a": -1}},
        {"conditions": [1]},
    ):
        data = json.loads(file.read_text())
        broken = tmp_path / "broken.json"
        broken.write_text(json.dumps(data | change))
        with pytest.raises(ValueError, match=r"broken\.json"):
            LatencyTable(Conditions(32), CountingTimer(), broken)


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_both_runtimes_measure(runtime):
    pytest.importorskip(runtime)
    net = isynet.create("1x3 h0", 3).fused()
    seconds = make_timer(runtime, rounds=2)({"net": net, "stage": net.stages}, (2, 3, 16, 16))
    assert set(seconds) == {"net", "stage"} and min(seconds.values()) > 0


def test_unknown_runtimes_are_named():
    with pytest.raises(ValueError, match=r"abacus.*onnxruntime"):
        make_timer("abacus")
