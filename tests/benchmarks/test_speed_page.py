import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from benchmarks.pages import __main__ as pages
from benchmarks.pages import speed
from matplotlib.figure import Figure

import nabla_attn as na
from benchmarks import tails
from nabla_attn.bench.suite import run_suite
from nabla_attn.bench.workloads import WORKLOADS, workload
from nabla_attn.record import RunRecord

ROOT = Path(__file__).parents[2]


@pytest.fixture
def undrawn(monkeypatch):
    """Charts are not compared, and drawing them takes longest."""
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: Path(path).touch())


def test_the_pages_in_docs_are_those_of_the_records(tmp_path, undrawn):
    shutil.copy(ROOT / "docs/models.md", tmp_path)
    shutil.copytree(ROOT / "docs/quality-images", tmp_path / "quality-images")
    pages.main(tmp_path, ROOT / "benchmarks/results")
    written = sorted(tmp_path.glob("*.md"))
    assert len(written) == 5
    for page in written:
        assert page.read_text() == (ROOT / "docs" / page.name).read_text(), "run `make pages`"


def page_of(kind, config, row, folder):
    """The page of benchmarks with one record of one row."""
    RunRecord(kind, config, 0, {}, "cpu", {"results": [row]}).save(folder / f"{kind}.json")
    return speed.build_page(folder, folder / "docs")


def test_the_cost_of_map_reuse_has_a_table(tmp_path):
    row = {"rule": "nabla-0.5; one map for 2 steps", "reuse_steps": 2}
    row |= dict.fromkeys(speed.REUSE_COLUMNS, 0.25) | {"recall": 0.9449}
    config = {"workload": "map reuse", "tokens": [9, 16, 16], "steps": 6}
    config |= {"guidance": 3.0, "prompts": ["a", "b"]}
    page = page_of("map_reuse", config, row, tmp_path)
    assert "| nabla-0.5; one map for 2 steps | 0.2500 | 0.9449 |" in page
    assert "9x16x16 tokens, 6 steps, guidance 3, 2 prompts" in page


def test_tails_have_a_table_of_errors_and_one_of_costs(tmp_path):
    cases = ((None, 0.4), ("mean", 0.3), ("first", 0.1))
    rows = [{"rule": "topk-0.1", "tail": t, "density": 0.11, "error": e} for t, e in cases]
    config = {"workload": "tails", "tokens": [9, 16, 16], "steps": 6, "guidance": 3.0}
    config |= {"num_rows": 16, "rules": ["topk-0.1"]}
    page = page_of("tail_error", config, {"prompt": "a", "rows": rows}, tmp_path)
    assert "| `topk-0.1` | 0.110 | 0.400 | 0.300 | 0.100 |" in page
    config = {"workload": "cost of tails", "shape": "toy-16k", "algorithm": "nabla-0.7"}
    config |= {"dtype": "bfloat16", "density": 0.1}
    row = {"tail": "first", "seconds": {"median": 0.5}, "over_dropped": 1.25}
    assert "| first | 0.5000 | 1.250 |" in page_of("tail_cost", config, row, tmp_path)


def test_the_errors_of_tails_are_measured_once_a_prompt(tmp_path, monkeypatch):
    monkeypatch.setattr(tails, "RULES", ("topk-0.2",))
    monkeypatch.setattr(tails, "PROMPTS", ("a small red square moving up",))
    path = tmp_path / "tail_error.json"
    run = partial(tails.error, frames=5, steps=1, guidance=1.0, num_rows=4, output=path)
    run()
    (result,) = RunRecord.load(path).numbers["results"]
    left_out, mean, first = (row["error"] for row in result["rows"])
    assert first < left_out and mean > 0
    monkeypatch.setattr(tails, "measure", None)
    run()
    assert RunRecord.load(path).numbers["results"] == [result]


def test_what_guidance_makes_of_errors_has_a_table(tmp_path):
    row = {"algorithm": "nabla-0.7", "prompted": 0.1, "free": 0.12, "guided": 0.25, "ratio": 2.5}
    row |= {"kept": 0.9, "adapters": True}
    config = {"workload": "guidance", "tokens": [16, 16, 16], "steps": 6}
    config |= {"guidance": 3.0, "prompts": ["a", "b"]}
    page = page_of("guidance_error", config, row, tmp_path)
    assert "| `nabla-0.7`, adapters | 0.100 | 0.120 | 0.250 | 2.500 | 0.900 |" in page
    assert "every step of 6, guidance 3, of 2 dense videos" in page


def test_suite_writes_records_and_the_page_comes_from_them(tmp_path, monkeypatch):
    monkeypatch.setattr("nabla_attn.backends.flex.why_not_compile", lambda device: "not in tests")
    small = replace(
        workload("toy-cpu"), grid=na.TokenGrid(3, 16, 24), heads=2, dim=32, dtype=torch.float32
    )
    monkeypatch.setitem(WORKLOADS, "toy-cpu", replace(small, densities=(0.4,)))
    paths = run_suite(("toy-cpu",), torch.device("cpu"), tmp_path / "results", rounds=1)
    record = RunRecord.load(paths[0])
    page = speed.build_page(tmp_path / "results", tmp_path / "docs")
    density = record.numbers["results"][0]["density"]
    assert f"{density:.3f}" in page and "ours (gather)" in page
    assert (tmp_path / "docs" / "images" / "speed_by_density.png").stat().st_size > 1000
    assert page == speed.build_page(tmp_path / "results", tmp_path / "docs")


def test_what_the_error_model_predicted_stands_beside_what_was_measured():
    row = {"name": "a schedule", "density": 0.1, "distances": [0.1, 0.3]}
    latents = {"rows": [row], "prompts": 2}
    assert "| a schedule | 0.100 | 0.2000 |" in speed._latents(latents)
    latents = {
        "rows": [row | {"predicted": 0.15}],
        "prompts": 2,
        "fit": {"rank_correlation": 1.0, "ratio": 1.25, "spread": 1.1},
    }
    text, *lines = speed._latents(latents)
    assert "| a schedule | 0.100 | 0.2000 | 0.1500 |" in lines
    assert "rank correlation 1.00, measured over predicted 1.25" in text
