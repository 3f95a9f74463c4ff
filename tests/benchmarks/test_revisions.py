import json

import pytest

from benchmarks import revisions
from nabla_attn.record import RunRecord


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


def test_revisions_are_compared_case_by_case_and_name_what_one_lacks(capsys):
    ours = bench_record((0.0521, {"gather": 0.5}), (0.1987, {"gather": 0.9, "new": 0.8}))
    base = bench_record((0.2, {"gather": 0.6}), (0.3, {"gather": 0.7}))
    (row,) = revisions.ratios(ours, base)
    assert (row["density"], row["contender"]) == (0.2, "gather")
    assert row["ratio"] == pytest.approx(1.5)
    revisions.compare("main", ours, base)
    assert capsys.readouterr().out.splitlines() == [
        "w float32 0.2 forward gather: 1.50x the share of ideal at main",
        "w float32 0.05 forward gather: not measured at main",
        "w float32 0.2 forward new: not measured at main",
        "w float32 0.3 forward gather: measured at main alone",
    ]


def test_an_unknown_revision_is_named():
    with pytest.raises(ValueError, match="git rev-parse failed"):
        revisions.measure_revision("no-such-revision", "toy-cpu", "cpu", 1)
