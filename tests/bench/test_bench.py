from dataclasses import replace
from pathlib import Path

import pytest
import torch

import nabla_attn as na
from nabla_attn import machine
from nabla_attn.bench import attention, contenders, report, scaling, suite
from nabla_attn.bench.attention import measure_map_share, measure_maps
from nabla_attn.bench.measure import check_output, sample_rows, time_in_turn, token_rows
from nabla_attn.bench.workloads import WORKLOADS, make_inputs, workload
from nabla_attn.cli import bench as cli_bench
from nabla_attn.cost.attention import attention_work
from nabla_attn.record import RunRecord

CPU = torch.device("cpu")
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SMALL = replace(
    workload("toy-cpu"), grid=na.TokenGrid(3, 16, 24), heads=2, dim=32, dtype=torch.float32
)


@pytest.fixture
def no_compiler(monkeypatch):
    """Compiling FlexAttention takes longer than everything else here."""
    monkeypatch.setattr("nabla_attn.backends.flex.why_not_compile", lambda device: "not in tests")


def test_workloads_have_the_published_sizes():
    tokens = {name: work.grid.num_tokens for name, work in WORKLOADS.items()}
    assert tokens["wan14b-720p"] == 75_600
    assert tokens["paper-768p"] == 80_640
    assert tokens["kandinsky5-10s"] == 93_696
    assert tokens["long-327k"] == 327_680
    assert tokens["hunyuan-720p"] == 118_800
    assert workload("paper-768p").dense_flops() == 4 * 80_640**2 * 40 * 128


def test_unknown_workload_lists_the_known():
    with pytest.raises(ValueError, match=r"unknown workload 'wan'; expected one of toy-cpu"):
        workload("wan")


@pytest.mark.parametrize("density", [0.1, 0.3])
def test_inputs_reach_the_wanted_density(density):
    work = replace(SMALL, grid=na.TokenGrid(8, 32, 32), heads=3)
    inputs = make_inputs(work, density, CPU)
    bmap = na.build_block_map(inputs.q, inputs.k, work.grid, inputs.config)
    assert bmap.density == pytest.approx(density, rel=0.1)
    assert bmap.mask.sum(-1).unique().numel() > 3


def test_attention_is_checked_and_timed(no_compiler):
    result = attention.measure_attention(SMALL, 0.4, CPU, rounds=1)
    ours = result["contenders"]["ours (gather)"]
    assert ours["gate"]["passed"] and ours["seconds"]["median"] > 0
    share = ours["speed_up"] * result["density"]
    assert ours["share_of_ideal"] == pytest.approx(share)
    products = result["density"] * SMALL.dense_flops() / result["matmul_flops_per_second"]
    assert result["stock_seconds"] > products
    reached = result["stock_seconds"] / ours["seconds"]["median"]
    assert ours["share_of_stock"] == pytest.approx(reached, rel=1e-3)
    assert "not in tests" in result["contenders"]["ours (flex)"]["why_not"]
    assert list(result["stages"]) == ["reorder", "map", "attention"]
    assert all(stage["median"] > 0 for stage in result["stages"].values())
    both = attention.measure_attention(SMALL, 0.4, CPU, rounds=1, backward=True)
    assert both["contenders"]["ours (gather)"]["seconds"]["median"] > 0


def test_a_wrong_output_is_never_timed(no_compiler, monkeypatch):
    def wrong(*args, **options):
        return 1.01 * na.nabla_attention(*args, **options)

    monkeypatch.setattr(contenders, "nabla_attention", wrong)
    ours = attention.measure_attention(SMALL, 0.4, CPU, rounds=1)["contenders"]["ours (gather)"]
    assert not ours["gate"]["passed"]
    assert "seconds" not in ours


def test_an_output_that_is_not_finite_fails_and_can_be_saved():
    q, k, v = (torch.randn(1, 1, 128, 8) for _ in range(3))
    found = check_output(torch.full_like(q, torch.nan), q, k, v, sample_rows(128), None)
    assert found["error"] is None and not found["passed"]


def test_gate_rows_are_the_map():
    inputs = make_inputs(SMALL, 0.4, CPU)
    out = na.nabla_attention(inputs.q, inputs.k, inputs.v, SMALL.grid, inputs.config)
    bmap = na.build_block_map(inputs.q, inputs.k, SMALL.grid, inputs.config)
    rows = sample_rows(SMALL.grid.num_tokens)
    keep = token_rows(bmap, SMALL.grid, rows)
    assert {0, SMALL.grid.num_tokens - 1} <= set(rows.tolist())
    assert check_output(out, inputs.q, inputs.k, inputs.v, rows, keep)["passed"]
    assert not check_output(out, inputs.q, inputs.k, inputs.v, rows, None)["passed"]


@pytest.mark.parametrize("own_block", [True, False])
def test_a_contender_is_held_to_its_own_map(monkeypatch, own_block):
    config = na.parse("nabla-0.4_sta-1-1-1")

    def attend(q, k, v):
        return na.nabla_attention(q, k, v, SMALL.grid, config)

    def build(q, k):
        return na.build_block_map(q, k, SMALL.grid, config)

    other = contenders.Contender("other", attend, own_map=build if own_block else None)
    monkeypatch.setattr(attention, "contenders", lambda *_, **__: [other])
    result = attention.measure_attention(SMALL, 0.4, CPU, rounds=1)["contenders"]["other"]
    assert result["gate"]["passed"] is own_block
    if own_block:
        inputs = make_inputs(SMALL, 0.4, CPU)
        assert result["density"] == build(inputs.q, inputs.k).density


def test_contenders_take_turns():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = time_in_turn(runs, CPU, rounds=2, warmup=1)
    assert calls == list("ababab")
    assert len(timings["a"].seconds) == 2


def test_exponents_are_fitted():
    points = [
        {"tokens": n, "seconds": {"dense": n**2.0, "sparse": n**1.5, "map": float(n)}}
        for n in (1000, 2000, 4000)
    ]
    assert scaling.fit_exponents(points) == pytest.approx({"dense": 2, "sparse": 1.5, "map": 1})


def test_crossover_is_the_length_from_which_sparse_always_wins():
    points = [
        {"tokens": tokens, "density": density, "speed_up": speed_up}
        for tokens, density, speed_up in [
            (256, 0.1, 1.2),
            (512, 0.1, 0.9),
            (1024, 0.1, 1.1),
            (1024, 0.7, 0.5),
            (2048, 0.3, 1.5),
        ]
    ]
    assert machine.min_tokens(points) == 1024
    assert machine.min_tokens(points[:2]) is None


def test_too_large_a_workload_is_refused_before_it_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "MEMORY_FACTOR", 10**6)
    with pytest.raises(ValueError, match=r"toy-cpu needs about .* GiB on cpu"):
        suite.run_suite(("toy-cpu",), CPU, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_table_of_contenders_that_failed_is_made():
    seconds, gate = {"median": 1.0, "min": 1.0, "max": 1.0}, {"error": 1.0, "budget": 2.0}
    broken = {"is_dense": True, "gate": {"error": None, "budget": 2.0, "passed": False}}
    ours = {"is_dense": False, "gate": gate, "seconds": seconds, "share_of_matmul": 0.5}
    ours["share_of_stock"] = 0.8
    result = {"workload": "w", "dtype": "float32", "direction": "forward", "density": 0.2}
    result["contenders"] = {"dense (flash)": broken, "ours (gather)": ours}
    numbers = {"results": [result]}
    text = report.section(RunRecord("bench", {"workload": "w"}, 0, {}, "cpu", numbers))
    assert "- dense (flash): not run, output is not finite." in text
    assert "| ours (gather) | 1.000 (1.000 to 1.000) | – | – | – | 0.50 | 0.50 |" in text
    assert "is gathered, each at its rate here): float32 forward 0.80 at 0.200." in text


def test_the_map_is_timed_beside_dense_attention():
    alone = measure_maps(SMALL, 0.3, CPU, rounds=1)
    assert list(alone["seconds"]) == ["ours (raster order in)"] and not alone["differing_entries"]
    assert measure_map_share(SMALL, 0.3, CPU, rounds=1)["map_share_of_dense"] > 0


def test_a_suite_writes_a_record_that_has_tables(no_compiler, tmp_path, monkeypatch):
    monkeypatch.setitem(WORKLOADS, "toy-cpu", replace(SMALL, densities=(0.4,)))
    said = []
    (path,) = suite.run_suite(
        ("toy-cpu",), CPU, tmp_path, rounds=1, on_progress=lambda *where: said.append(where)
    )
    record = RunRecord.load(path)
    density = record.numbers["results"][0]["density"]
    text = report.section(record)
    assert f"{density:.3f}" in text and "ours (gather)" in text and "the map takes" in text.lower()
    assert said[0] == ("toy-cpu float32 density 0.4 forward", 0, 5)
    assert [done for _, done, _ in said] == list(range(5))


def test_a_package_without_its_checkout_says_what_pages_need(monkeypatch, tmp_path):
    monkeypatch.setattr(cli_bench, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="need a checkout of nabla-attn, got a package in"):
        cli_bench.run(device="cpu", docs=tmp_path / "docs")


def test_the_command_makes_the_pages_of_a_checkout(tmp_path):
    cli_bench.run(device="cpu", docs=tmp_path / "docs", output=tmp_path / "none")
    assert "# Benchmarks" in (tmp_path / "docs/benchmarks.md").read_text()


def test_mem_stands_beside_the_share_of_ideal():
    record = RunRecord.load(RESULTS / "bench_toy-16k_cpu.json")
    lines = report.section(record).splitlines()
    head = next(line for line in lines if "share of ideal" in line).split(" | ")
    assert head[head.index("share of ideal") + 1] == "MEM"
    dense = next(line for line in lines if "| 1 | dense" in line).split(" | ")
    assert dense[head.index("MEM")] == f"{attention_work(16384, 2, 128).mem:.1f}"
