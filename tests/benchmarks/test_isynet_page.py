"""docs/isynet.md is made of its record, and the record of what is counted."""

import json
from pathlib import Path

import pytest
from benchmarks.pages.isynet import RECORD, write_tables

from benchmarks import isynet_counts

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "benchmarks/results"
FRESH = "run python -m benchmarks.isynet_counts benchmarks/results/isynet_counts.json, make pages"


def counts():
    return json.loads((RECORDS / RECORD).read_text())["numbers"]["results"][0]


def test_the_page_is_the_one_of_the_record(tmp_path):
    copy = tmp_path / "isynet.md"
    before = (ROOT / "docs/isynet.md").read_text()
    copy.write_text(before)
    write_tables(copy, RECORDS)
    assert copy.read_text() == before, FRESH
    copy.write_text(before.replace("<!-- mem: end -->", ""))
    with pytest.raises(ValueError, match="no place for the table: it needs <!-- mem: begin -->"):
        write_tables(copy, RECORDS)


def test_another_record_gives_another_page(tmp_path):
    copy = tmp_path / "isynet.md"
    copy.write_text((ROOT / "docs/isynet.md").read_text())
    record = json.loads((RECORDS / RECORD).read_text())
    record["numbers"]["results"][0]["published"][0]["predicted"] = 0.98765
    (tmp_path / RECORD).write_text(json.dumps(record))
    write_tables(copy, tmp_path)
    assert "| 987.65 |" in copy.read_text()


def test_the_record_is_what_is_counted_now():
    found = counts()
    now = isynet_counts.count_networks(), isynet_counts.predict_published()
    for rows, kept in zip(now, (found["networks"], found["published"]), strict=True):
        assert [row.pop("name") for row in rows] == [row.pop("name") for row in kept], FRESH
        for row, other in zip(rows, kept, strict=True):
            assert row == pytest.approx(other, rel=1e-6, abs=1e-9), FRESH
    assert max(abs(row["error"]) for row in found["published"]) < 0.07
