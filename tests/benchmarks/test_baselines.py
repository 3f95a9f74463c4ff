import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from benchmarks.baselines import Baselines, diffusers_block_map

import nabla_attn as na
from benchmarks import variants
from nabla_attn.bench.attention import measure_attention, measure_maps
from nabla_attn.bench.contenders import contenders, list_contenders
from nabla_attn.bench.workloads import make_inputs, workload

CPU = torch.device("cpu")
SMALL = replace(
    workload("toy-cpu"), grid=na.TokenGrid(3, 16, 24), heads=2, dim=32, dtype=torch.float32
)


@pytest.fixture
def no_flex(monkeypatch):
    """Compiling takes too long here."""
    monkeypatch.setattr("nabla_attn.backends.flex.why_not_compile", lambda device: "not in tests")


def test_diffusers_map_is_ours_where_sums_are_exact_enough():
    inputs = make_inputs(replace(SMALL, dtype=torch.float32), 0.4, CPU)
    theirs = diffusers_block_map(inputs.q, inputs.k, SMALL.grid, inputs.config.threshold)
    ours = na.build_block_map(inputs.q, inputs.k, SMALL.grid, inputs.config)
    assert torch.equal(theirs.mask, ours.mask)


def test_all_builders_make_the_same_map():
    result = measure_maps(SMALL, 0.3, CPU, rounds=1, baselines=Baselines())
    assert len(result["differing_entries"]) == 2
    assert set(result["differing_entries"].values()) == {0}
    assert set(result["seconds"]) > set(result["differing_entries"])


def test_dry_listing_gives_reasons():
    found = list_contenders(workload("wan14b-720p"), CPU, baselines=Baselines())
    assert found["ours (gather)"] == (None, None)
    assert "no backward on CPU" in found["ours (flex)"][1]
    assert "multiples of 8" in found["diffusers NABLA"][0]


def test_variants_are_listed_with_reasons_and_run_on_gpus_alone(no_flex):
    listed = list_contenders(workload("paper-768p"), CPU, baselines=Baselines(has_variants=True))
    names = [f"ours (flex, {name})" for name, *_ in variants.VARIANTS]
    assert set(names) < set(listed)
    assert all("not in tests" in listed[name][0] for name in names)
    inputs = make_inputs(SMALL, 0.4, CPU)
    assert not set(names) & {c.name for c in contenders(SMALL, inputs, CPU, baselines=Baselines())}


def test_variants_are_held_to_their_own_maps(no_flex, monkeypatch):
    monkeypatch.setattr(variants, "BACKEND", "gather")
    monkeypatch.setattr(variants, "why_not_flash", lambda *_: None)
    every = Baselines(has_variants=True)
    result = measure_attention(SMALL, 0.4, CPU, rounds=1, baselines=every)
    found = {name: result["contenders"][f"ours (flex, {name})"] for name, *_ in variants.VARIANTS}
    assert all(entry["gate"]["passed"] for entry in found.values())
    assert found["pairs share the union"]["density"] > result["density"]
    assert "density" not in found["tiles of 128"]
    for entry in found.values():
        useful = min(result["density"], entry.get("density", 1))
        assert entry["share_of_ideal"] == pytest.approx(entry["speed_up"] * useful)


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
        "runpy.run_module('benchmarks.suite', run_name='__main__')"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "| float32 | forward |" in process.stdout
    assert len(list(tmp_path.glob("bench_toy-cpu_*.json"))) == 1
