"""The first answer against the second: fresh caches for each pair of runs, one row a size."""

from pathlib import Path

from benchmarks.pages import speed

from benchmarks import cold_start
from nabla_attn.record import RunRecord


def test_each_pair_of_runs_has_caches_of_its_own(tmp_path, monkeypatch):
    seen = []

    def run(arguments, output, fresh):
        seen.append(fresh)
        tokens = {"frames": 16, "height": 16, "width": 16}
        RunRecord("generate", {}, 0, {}, "cpu", {"tokens": tokens}).save(
            output.with_suffix(".json")
        )
        return 6.0 if len(seen) % 2 == 0 else 5.0

    monkeypatch.setattr(cold_start, "_seconds", run)
    output = tmp_path / "cold_start.json"
    cold_start.main(["--rounds", "2", "--sizes", "61", "128", "--output", str(output)])
    warming, *pairs = seen
    assert warming == {} and pairs[0] == pairs[1] != pairs[2] == pairs[3]
    assert set(pairs[0]) == set(cold_start.CACHES)
    assert not any(Path(path).exists() for path in pairs[0].values())
    page = speed.build_page(tmp_path, tmp_path / "docs")
    assert "| 61 frames of 128x128 | 6.0 | 5.0 | 1.20 |" in page
    assert "Medians of 2 such pairs" in page
