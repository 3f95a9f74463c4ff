import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import nabla_attn as na
from nabla_attn import crossover
from nabla_attn.bench import (
    attention,
    contenders,
    gate,
    reuse_table,
    revisions,
    scaling,
    suite,
    tables,
)
from nabla_attn.bench.inputs import make_inputs
from nabla_attn.bench.maps import measure_map_share, measure_maps
from nabla_attn.bench.measure import time_in_turn
from nabla_attn.bench.rivals import diffusers_block_map
from nabla_attn.bench.workloads import WORKLOADS, workload
from nabla_attn.cli import bench as cli_bench
from nabla_attn.record import RunRecord

CPU = torch.device("cpu")
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
    found = gate.check_output(torch.full_like(q, torch.nan), q, k, v, gate.sample_rows(128), None)
    assert found["error"] is None and not found["passed"]


def test_gate_rows_are_the_map():
    inputs = make_inputs(SMALL, 0.4, CPU)
    out = na.nabla_attention(inputs.q, inputs.k, inputs.v, SMALL.grid, inputs.config)
    bmap = na.build_block_map(inputs.q, inputs.k, SMALL.grid, inputs.config)
    rows = gate.sample_rows(SMALL.grid.num_tokens)
    keep = gate.token_rows(bmap, SMALL.grid, rows)
    assert {0, SMALL.grid.num_tokens - 1} <= set(rows.tolist())
    assert gate.check_output(out, inputs.q, inputs.k, inputs.v, rows, keep)["passed"]
    assert not gate.check_output(out, inputs.q, inputs.k, inputs.v, rows, None)["passed"]


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


def test_diffusers_map_is_ours_where_sums_are_exact_enough():
    inputs = make_inputs(replace(SMALL, dtype=torch.float32), 0.4, CPU)
    theirs = diffusers_block_map(inputs.q, inputs.k, SMALL.grid, inputs.config.threshold)
    ours = na.build_block_map(inputs.q, inputs.k, SMALL.grid, inputs.config)
    assert torch.equal(theirs.mask, ours.mask)


def test_all_builders_make_the_same_map():
    result = measure_maps(SMALL, 0.3, CPU, rounds=1)
    assert set(result["differing_entries"].values()) == {0}
    assert measure_map_share(SMALL, 0.3, CPU, rounds=1)["map_share_of_dense"] > 0


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
    assert crossover.min_tokens(points) == 1024
    assert crossover.min_tokens(points[:2]) is None


def test_too_large_a_workload_is_refused_before_it_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "MEMORY_FACTOR", 10**6)
    with pytest.raises(ValueError, match=r"toy-cpu needs about .* GiB on cpu"):
        suite.run_suite(("toy-cpu",), CPU, tmp_path)
    assert not list(tmp_path.iterdir())


def test_suite_writes_records_and_the_page_comes_from_them(no_compiler, tmp_path, monkeypatch):
    monkeypatch.setitem(WORKLOADS, "toy-cpu", replace(SMALL, densities=(0.4,)))
    paths = suite.run_suite(("toy-cpu",), CPU, tmp_path / "results", rounds=1)
    record = RunRecord.load(paths[0])
    page = tables.build_docs(tmp_path / "results", tmp_path / "docs")
    density = record.numbers["results"][0]["density"]
    assert f"{density:.3f}" in page and "ours (gather)" in page
    assert (tmp_path / "docs" / "images" / "speed_by_density.png").stat().st_size > 1000
    assert page == tables.build_docs(tmp_path / "results", tmp_path / "docs")


def test_a_table_of_contenders_that_failed_is_made():
    seconds, gate = {"median": 1.0, "min": 1.0, "max": 1.0}, {"error": 1.0, "budget": 2.0}
    broken = {"is_dense": True, "gate": {"error": None, "budget": 2.0, "passed": False}}
    ours = {"is_dense": False, "gate": gate, "seconds": seconds, "share_of_matmul": 0.5}
    result = {"dtype": "float32", "direction": "forward", "density": 0.2}
    result["contenders"] = {"dense (flash)": broken, "ours (gather)": ours}
    numbers = {"results": [result]}
    text = tables.section(RunRecord("bench", {"workload": "w"}, 0, {}, "cpu", numbers))
    assert "- dense (flash): not run, output is not finite." in text
    assert "| ours (gather) | 1.000 (1.000 to 1.000) | – | – | 0.50 | 0.50 |" in text


def bench_record(*results):
    def entry(density, **shares):
        case = {"workload": "w", "dtype": "float32", "density": density, "direction": "forward"}
        ran = {name: {"share_of_ideal": share, "is_dense": False} for name, share in shares.items()}
        dense = {"dense": {"share_of_ideal": 1.0, "is_dense": True}}
        return case | {"contenders": ran | dense | {"absent": {"why_not": "no compiler"}}}

    numbers = {"results": [entry(density, **shares) for density, shares in results]}
    # Parts of a record that no contender ran in.
    numbers["results"].append({"workload": "w", "dtype": "float32", "map_share_of_dense": 0.1})
    return RunRecord("bench", {}, 0, {}, "cpu", json.loads(json.dumps(numbers)))


def test_revisions_are_compared_case_by_case_and_name_what_one_lacks(monkeypatch, capsys, tmp_path):
    ours = bench_record((0.0521, {"gather": 0.5}), (0.1987, {"gather": 0.9, "new": 0.8}))
    base = bench_record((0.2, {"gather": 0.6}), (0.3, {"gather": 0.7}))
    (row,) = revisions.ratios(ours, base)
    assert (row["density"], row["contender"]) == (0.2, "gather")
    assert row["ratio"] == pytest.approx(1.5)
    monkeypatch.setattr(revisions, "measure_revision", lambda *_: base)
    ours.save(tmp_path / "ours.json")
    cli_bench._compare_with("main", {"w": tmp_path / "ours.json"}, "cpu", 1)
    assert capsys.readouterr().out.splitlines() == [
        "w float32 0.2 forward gather: 1.50x the share of ideal at main",
        "w float32 0.05 forward gather: not measured at main",
        "w float32 0.2 forward new: not measured at main",
        "w float32 0.3 forward gather: measured at main alone",
    ]


def test_an_unknown_revision_is_named():
    with pytest.raises(ValueError, match="git rev-parse failed"):
        revisions.measure_revision("no-such-revision", "toy-cpu", "cpu", 1)


def test_dry_listing_gives_reasons():
    found = contenders.list_contenders(workload("wan14b-720p"), CPU)
    assert found["ours (gather)"] == (None, None)
    assert "no backward on CPU" in found["ours (flex)"][1]
    assert "multiples of 8" in found["diffusers NABLA"][0]


def test_the_benchmark_needs_only_torch(tmp_path):
    # A GPU machine without a network: none of these can be imported there.
    absent = ["jaxtyping", "diffusers", "transformers", "typer", "rich", "scipy", "matplotlib"]
    absent.append("psutil")
    code = (
        f"import sys, runpy; sys.modules.update(dict.fromkeys({absent}));"
        f"sys.argv = ['bench', '--device', 'cpu', '--rounds', '1', '--output', {str(tmp_path)!r}];"
        "from dataclasses import replace; from nabla_attn.bench import suite, workloads as w;"
        "from nabla_attn.core.grid import TokenGrid;"
        "toy = replace(w.WORKLOADS['toy-cpu'], grid=TokenGrid(2, 11, 13), densities=(0.5,));"
        "w.WORKLOADS['toy-cpu'] = toy; suite.CPU_SUITE = ('toy-cpu',);"
        "import nabla_attn.backends.flex as f; f.why_not_compile = lambda device: 'not in tests';"
        "runpy.run_module('nabla_attn.bench', run_name='__main__')"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "| float32 | forward |" in process.stdout
    assert len(list(tmp_path.glob("bench_toy-cpu_*.json"))) == 1


def page_of(kind, config, row, folder):
    """The page of benchmarks with one record of one row."""
    RunRecord(kind, config, 0, {}, "cpu", {"results": [row]}).save(folder / f"{kind}.json")
    return tables.build_docs(folder, folder / "docs")


def test_the_cost_of_map_reuse_has_a_table(tmp_path):
    row = {"rule": "nabla-0.5; one map for 2 steps", "reuse_steps": 2}
    row |= dict.fromkeys(reuse_table.COLUMNS, 0.25) | {"recall": 0.9449}
    config = {"workload": "map reuse", "tokens": [9, 16, 16], "steps": 6}
    config |= {"guidance": 3.0, "prompts": ["a", "b"]}
    page = page_of("map_reuse", config, row, tmp_path)
    assert "| nabla-0.5; one map for 2 steps | 0.2500 | 0.9449 |" in page
    assert "9x16x16 tokens, 6 steps, guidance 3, 2 prompts" in page


def test_what_guidance_makes_of_errors_has_a_table(tmp_path):
    row = {"algorithm": "nabla-0.7", "prompted": 0.1, "free": 0.12, "guided": 0.25, "ratio": 2.5}
    row |= {"kept": 0.9, "adapters": True}
    config = {"workload": "guidance", "tokens": [16, 16, 16], "steps": 6}
    config |= {"guidance": 3.0, "prompts": ["a", "b"]}
    page = page_of("guidance_error", config, row, tmp_path)
    assert "| `nabla-0.7`, adapters | 0.100 | 0.120 | 0.250 | 2.500 | 0.900 |" in page
    assert "every step of 6, guidance 3, of 2 dense videos" in page
