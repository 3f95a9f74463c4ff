import base64
import hashlib
import json
import re
from urllib.parse import unquote

import numpy as np
import pytest
from tests.browser import chromium, open_page
from typer.testing import CliRunner

from nabla_attn.cli import app
from nabla_attn.generation.video import write_video
from nabla_attn.record import RunRecord
from nabla_attn.viz import report
from nabla_attn.viz.document import Section, Table, Text, write_html, write_markdown
from nabla_attn.viz.report import build_report
from nabla_attn.viz.verdict import judge_run

MEASURES = ("density", "kept_mass", "true_mass", "best_mass", "output_error")


ALGORITHMS = (("dense", 1.0), ("nabla-0.7", 0.4), ("sta-3-3-3", 0.3))


def write_run(folder, num_prompts=3, prompt="a red circle moving right {}", algorithms=ALGORITHMS):
    """Made-up records in the layout of `nabla evaluate`."""
    rng = np.random.default_rng(0)
    for algo, density in algorithms:
        for index in range(num_prompts):
            config = {
                "prompt": prompt.format(index), "sparse_algo": algo, "height": 32, "width": 48,
                "frames": 5, "steps": 4, "guidance": 5.0, "model": "builtin", "dtype": "float32",
                "device": "cpu", "prompt_index": index, "seed": 0,
            }  # fmt: skip
            is_dense = algo == "dense"
            numbers = {
                "seconds": {"transformer": density * (10 + index)},
                "tokens": {"frames": 2, "height": 2, "width": 3},
                "attention": {"density": density},
                "memory_bytes": 5e8,
                "to_dense": {
                    "psnr": None if is_dense else 20 + float(rng.uniform()), "ssim": 0.9,
                    "motion_psnr": None if is_dense else 30.0, "motion_ssim": 0.9,
                },
                "to_prompt": {
                    "world": {"colour": True, "outline": 0.8, "all": bool(rng.uniform() > 0.3)}
                },
            }  # fmt: skip
            if not is_dense:
                numbers["probe"] = {name: density for name in MEASURES} | {
                    f"{name}_per_step_and_layer": rng.uniform(size=(4, 3)).tolist()
                    for name in MEASURES
                }
            path = folder / algo / f"p{index:04d}-s0.json"
            video = rng.integers(255, size=(5, 32, 48, 3), dtype=np.uint8)
            write_video(video, path.with_suffix(".mp4"), 8)
            RunRecord("evaluate", config, 0, {"torch": "2.13.0"}, "a machine", numbers).save(path)
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """Drawing takes longer than all else of a report."""
    monkeypatch.setattr(report, "_draw", lambda draw: b"a picture")


def test_the_same_records_give_the_same_bytes(tmp_path):
    write_run(tmp_path / "run")
    for name in ("a", "b"):
        result = CliRunner().invoke(
            app, ["report", str(tmp_path / "run"), "--output", str(tmp_path / name / "page")]
        )
        assert result.exit_code == 0, result.output
    files = sorted(
        p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()
    )
    assert [str(file) for file in files] == [
        "page-images/curves.png", "page-images/losses.png", "page-images/videos.png",
        "page.html", "page.md",
    ]  # fmt: skip
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    page = (tmp_path / "a" / "page.html").read_text()
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles[:3] == ["Verdict", "Videos", "Results"] and titles[-1] == "Environment"
    assert page.count("<video ") == 3
    assert page.index("<video ") < page.index("<table>")
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    text = (tmp_path / "a" / "page.md").read_text()
    rules = "nabla-0.7: sparse from the first step; sta-3-3-3: first 12 steps dense"
    for word in (rules, "40.0%", "worst layer", "builtin", "2.13.0", "to dense"):
        assert word in text, word


@pytest.mark.parametrize(
    ("version", "words"), [(None, "version 1 of the judge"), ("2", "version 2 of the judge")]
)
def test_the_judge_of_a_run_is_named(tmp_path, version, words, undrawn):
    run = write_run(tmp_path)
    for path in run.glob("*/*.json"):
        record = RunRecord.load(path)
        world = record.numbers["to_prompt"]["world"]
        if version:
            record.config["world_judge"] = version
            world |= {"outline": 0.876, "outline_min": 0.5}
        record.save(path)
    texts = [block for section in build_report([run]) for block in section.blocks]
    assert any(words in block.text for block in texts if isinstance(block, Text))
    tables = [block for block in texts if isinstance(block, Table) and "all" in block.header]
    assert ("worst frame" in tables[0].header) == (version == "2")
    assert (tables[0].rows[0][-3][:5] == "0.876") == (version == "2")


def metrics(judge=None, difference=None, seconds=10.0, ssim=0.9):
    """Of one algorithm, as `evaluation.records` gives them."""
    found = {"seconds": {"value": seconds}, "ssim": {"value": ssim}, "density": {"value": 0.3}}
    if judge is not None:
        found["judge_all"] = {"value": judge, "count": 128, "difference": difference}
    return found


def test_the_verdict_is_the_fastest_that_follows_prompts_as_dense_does():
    summary = {
        "dense": metrics(0.8, [0.0, 0.0, 0.0], 20.0, 1.0),
        "nabla-0.9": metrics(0.82, [0.02, -0.05, 0.07], 16.0),
        "nabla-0.7": metrics(0.8, [0.0, -0.05, 0.06], 10.0),
        "nabla-0.2": metrics(0.7, [-0.1, -0.3, 0.01], 5.0),
    }
    text = judge_run(summary)
    assert text.startswith("nabla-0.7, the fastest of 2 algorithms that are not behind dense")
    assert "80.0% of 128 videos against 80.0%" in text and "[-5.0%, +6.0%]" in text
    assert "2.00 times the speed" in text and text.count(". ") == 0
    del summary["nabla-0.9"], summary["nabla-0.7"]
    assert judge_run(summary).startswith("nabla-0.2 shows what the prompt says in 70.0%")
    summary["nabla-0.1"] = metrics(0.5, [-0.3, -0.4, -0.2], 4.0)
    assert judge_run(summary).startswith("nabla-0.2, of all algorithms the least behind dense")


def test_the_verdict_without_a_judge_or_without_intervals():
    summary = {"dense": metrics(seconds=20.0), "nabla-0.9": metrics(ssim=0.98)}
    assert judge_run(summary).startswith("nabla-0.9 is measured: 2.00 times the speed")
    summary["nabla-0.2"] = metrics(0.8, [0.0, None, None], seconds=5.0)
    text = judge_run(summary)
    assert "attention is nabla-0.9: 2.00 times" in text and "fastest is nabla-0.2: 4.00" in text
    assert "alone" in judge_run({"dense": metrics()})


def test_only_the_page_s_own_script_runs(tmp_path):
    write_html("t", [], tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    script = re.search(r"<script>(.*)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'\"" in page


@pytest.mark.slow
def test_videos_play_side_by_side_in_step(tmp_path):
    write_run(tmp_path / "run", 2)
    write_html("t", build_report([tmp_path / "run"]), tmp_path / "a.html")
    times = "() => [...document.querySelectorAll('video')].map(video => video.currentTime)"
    with chromium() as browser:
        page, errors = open_page(browser, (tmp_path / "a.html").as_uri())
        page.get_by_role("button", name="Pause").wait_for()
        for _ in range(3):
            page.wait_for_timeout(300)
            now = page.evaluate(times)
            assert max(now) - min(now) < 0.125, "one frame"
        page.get_by_role("button", name="Pause").click()
        stopped = page.evaluate(times)
        page.wait_for_timeout(300)
        assert page.evaluate(times) == stopped and len(set(stopped)) == 1
        slider = page.get_by_role("slider", name="Time in the videos")
        slider.evaluate("(s) => { s.value = .25; s.dispatchEvent(new Event('input')); }")
        assert page.evaluate(times) == [0.25] * 3
        assert errors == []


def test_videos_beyond_the_limit_are_named(tmp_path, monkeypatch, undrawn):
    write_run(tmp_path / "run", 1)
    size = (tmp_path / "run/dense/p0000-s0.mp4").stat().st_size
    monkeypatch.setattr(report, "MAX_VIDEO_BYTES", int(size * 1.5))
    videos = next(s for s in build_report([tmp_path / "run"]) if s.title == "Videos")
    assert [clip.label for clip in videos.blocks[1].clips] == ["dense"]
    assert "Not shown: nabla-0.7, sta-3-3-3." in videos.blocks[0].text


def test_the_report_as_json(tmp_path, undrawn):
    write_run(tmp_path / "run", 2)
    asked = ["report", str(tmp_path / "run"), "--output", str(tmp_path / "page"), "--json"]
    values = json.loads(CliRunner().invoke(app, asked).stdout)
    assert values["html"] == str(tmp_path / "page.html")
    assert values["markdown"] == str(tmp_path / "page.md")
    (verdict,) = values["verdicts"]
    assert verdict in (tmp_path / "page.md").read_text().replace("\\", "")


def test_a_number_in_the_name_is_no_ending(tmp_path, undrawn):
    write_run(tmp_path / "run", 2)
    for name in ("report-nabla-0.7", "report-nabla-0.5.md"):
        asked = ["report", str(tmp_path / "run"), "--output", str(tmp_path / "pages" / name)]
        result = CliRunner().invoke(app, asked)
        assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "pages").iterdir()} == {
        f"report-nabla-0.{n}{end}" for n in (5, 7) for end in (".md", ".html", "-images")
    }


def test_each_run_has_its_own_pictures(tmp_path):
    write_run(tmp_path / "a", 2)
    write_run(tmp_path / "b", 3)
    page = tmp_path / "two runs.md"
    write_markdown("Two", build_report([tmp_path / "a", tmp_path / "b"]), page)
    names = re.findall(r"\(([^()]*png)\)", page.read_text())
    assert len(names) == len(set(names)) == 6
    assert all(name.startswith("two%20runs-images/") for name in names)
    files = {unquote(name): (tmp_path / unquote(name)).read_bytes() for name in names}
    assert files["two runs-images/curves.png"] != files["two runs-images/curves-2.png"]


def test_prompts_stay_text(tmp_path, undrawn):
    write_run(tmp_path / "run", 1, "<script>alert(1)</script> | ![x](http://evil) {}")
    sections = build_report([tmp_path / "run"])
    write_html("t", sections, tmp_path / "a.html")
    write_markdown("t", sections, tmp_path / "a.md")
    assert "<script>alert" not in (tmp_path / "a.html").read_text()
    text = (tmp_path / "a.md").read_text()
    assert "<script>" not in text.replace("\\<", "")
    assert "![x]" not in text


def test_votes_in_a_report(tmp_path):
    shares = {"votes": 4} | {
        name: [0.25, 0.1, 0.5]
        for name in ("baseline", "method", "both_good", "both_bad", "difference")
    }
    numbers = {
        "notice": "synthetic raters", "baseline": "dense", "raters": 3, "raters_counted": 2,
        "rule": "A rule.", "methods": {"nabla-0.7": {"overall": shares}},
        "agreement": {"overall": None},
    }  # fmt: skip
    RunRecord("vote", {}, 0, {}, "raters", numbers).save(tmp_path / "results.json")
    (section,) = build_report([tmp_path])
    lead, text, table = section.blocks
    assert lead.is_lead and lead.text == (
        "Of 4 votes, 25% prefer nabla-0.7, 25% prefer dense, and 50% neither."
    )
    assert isinstance(text, Text) and "synthetic raters" in text.text
    assert table.rows[0][2] == "25.0% [10.0%, 50.0%]"


def test_what_is_no_run_leaves_nothing_behind(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, message in (("nowhere", "there is no folder"), ("empty", "no records of")):
        asked = ["report", str(tmp_path / name), "--output", str(tmp_path / "new" / "page")]
        result = CliRunner().invoke(app, asked)
        assert result.exit_code == 2 and message in result.output
    assert not (tmp_path / "new").exists()


def test_a_folder_without_records_is_named(tmp_path):
    with pytest.raises(ValueError, match="nabla evaluate"):
        build_report([tmp_path])


def test_tables_are_escaped(tmp_path):
    section = Section("a <b>", [Table(("x|y",), (("1 | 2",),))])
    write_markdown("t", [section], tmp_path / "a.md")
    assert "| x\\|y |" in (tmp_path / "a.md").read_text()
    write_html("t", [section], tmp_path / "a.html")
    assert "<h2>a &lt;b&gt;</h2>" in (tmp_path / "a.html").read_text()
