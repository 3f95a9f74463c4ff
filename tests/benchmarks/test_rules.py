"""Which blocks to keep when the rest is estimated: what is measured, and its table."""

import math
from functools import partial

import pytest
from benchmarks.pages.rules import rule_table

from benchmarks import rules
from nabla_attn.record import RunRecord


def test_errors_of_rules_are_measured_once_a_prompt(tmp_path, monkeypatch):
    monkeypatch.setattr(rules, "RULES", ("topk-0.3", "pisa-0.3", "nabla-1"))
    path = tmp_path / "rule_error.json"
    run = partial(rules.main, frames=5, steps=1, num_prompts=1, output=path)
    run()
    (result,) = RunRecord.load(path).numbers["results"]
    rows = {(row["rule"], row["tail"]): row for row in result["rows"]}
    assert len(rows) == 3 * (3 + 2 * len(rules.SHARES))
    for tail in (None, "mean", "first"):
        assert rows["nabla-1", tail]["error"] < 1e-6
        assert rows["nabla-1", tail]["recall"] == pytest.approx(1)
        # Of as many blocks none hold more than those of the highest exact mass.
        same = [row for row in rows.values() if row["density"] == rows["topk-0.3", tail]["density"]]
        best = max(row["recall"] for row in same)
        assert rows["topk-0.3", tail]["recall"] <= best
    assert rows["topk-0.3", "first"]["error"] < rows["topk-0.3", None]["error"]
    # Both guidance branches of every layer.
    assert rows["topk-0.3", None]["calls"] == 2 * 6
    monkeypatch.setattr(rules, "measure", None)
    run()
    assert RunRecord.load(path).numbers["results"] == [result]


def test_rules_are_compared_at_equal_densities():
    def rows(shift):
        points = [("topk-0.05", 0.06, 0.4), ("topk-0.2", 0.2, 0.2), ("nabla-0.1", 0.03, 0.5)]
        points += [("nabla-0.3", 0.12, 0.3 + shift), ("exact mass 0.05", 0.06, 0.1)]
        points += [("exact mass 0.2", 0.2, 0.1)]
        return [
            {"rule": rule, "tail": tail, "density": density, "error": error, "recall": 0.5}
            for rule, density, error in points
            for tail in (None, "mean", "first")
        ]

    config = {"tokens": [16, 16, 16], "steps": 6, "guidance": 3.0, "num_tokens": 16}
    config |= {"num_blocks": 4}
    results = [{"prompt": "a", "rows": rows(0.0)}, {"prompt": "b", "rows": rows(0.01)}]
    lines = rule_table(RunRecord("rule_error", config, 0, {}, "cpu", {"results": results}))
    between = 0.5 + (0.305 - 0.5) * math.log(0.06 / 0.03) / math.log(0.12 / 0.03)
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:]]
        for line in lines
        if line.startswith("|")
    }
    assert abs(float(cells["`nabla`"][0]) - between) < 1e-3
    assert cells["`nabla`"][3] == "-" and cells["`topk`"][3] == "0.200"
    assert cells["exact mass"][0] == "0.100" and cells["`topk`"][6] == "0.500"
    assert any("0.060: dropped: `topk` errs least" in line for line in lines) == (between > 0.4)
