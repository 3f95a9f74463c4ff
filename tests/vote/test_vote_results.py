import csv
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("sqlalchemy")

from tests.vote.study_helpers import make_small_study, write_run

from nabla_attn.generation.video import write_video
from nabla_attn.media import read_video
from nabla_attn.moving_shapes import render, sample_scene
from nabla_attn.moving_shapes.judge import score
from nabla_attn.record import RunRecord
from nabla_attn.vote.analysis import Exclusion, Judgement, count_votes, measure_agreement
from nabla_attn.vote.create import damage, make_study
from nabla_attn.vote.export import draw_chart, results_page, votes_csv
from nabla_attn.vote.study import (
    QUESTIONS,
    Pair,
    Study,
    database_path,
    draw_assignments,
    videos_folder,
)


def study_of(num_pairs=4):
    pairs = [Pair(f"p{i}", f"prompt {i}", "nabla-0.7", "a.mp4", "b.mp4") for i in range(num_pairs)]
    control = Pair("c", "prompt 0", "control", "a.mp4", "d.mp4", is_control=True)
    return Study("Which?", "dense", (*pairs, control), fps=8, pairs_per_rater=num_pairs)


def row(rater, pair, answer, swapped=False, repeat=False):
    return SimpleNamespace(
        rater_id=rater, position=0, pair_id=pair, is_swapped=swapped, is_repeat=repeat,
        seconds=1.0, created="2026-01-01", **dict.fromkeys(QUESTIONS, answer),
    )  # fmt: skip


def test_sides_are_undone():
    # The method is second when not swapped, first when swapped.
    rows = [row(1, "p0", "second"), row(1, "p1", "first", swapped=True), row(1, "p2", "first")]
    shares = count_votes(study_of(), rows)["methods"]["nabla-0.7"]["overall"]
    assert shares["votes"] == 3
    assert shares["method"][0] == pytest.approx(2 / 3, abs=1e-4)
    assert shares["baseline"][0] == pytest.approx(1 / 3, abs=1e-4)
    assert shares["difference"][0] == pytest.approx(1 / 3, abs=1e-4)
    assert shares["method"][1:] == [None, None]  # one rater gives no interval


def test_intervals_resample_raters_not_votes():
    # Two raters, each of one mind: whatever is resampled is 0, half or all, never between.
    rows = [row(1, f"p{i}", "first") for i in range(4)] + [
        row(2, f"p{i}", "second") for i in range(4)
    ]
    assert count_votes(study_of(), rows)["methods"]["nabla-0.7"]["overall"]["method"] == [0.5, 0, 1]
    many = [row(r, "p0", "both_good") for r in range(30)]
    shares = count_votes(study_of(), many)["methods"]["nabla-0.7"]["overall"]
    assert shares["both_good"] == [1, 1, 1]


def test_repeats_and_controls_are_not_counted_as_votes():
    rows = [row(1, "p0", "first"), row(1, "p0", "second", swapped=True, repeat=True)]
    rows += [row(1, "c", "first")]
    counted = count_votes(study_of(), rows)
    assert counted["votes_counted"] == 1
    assert counted["repeats"] == {"same": 1, "of": 1}
    assert counted["controls"] == {"right": 1, "of": 1}
    assert list(counted["methods"]) == ["nabla-0.7"]


def test_raters_are_left_out_by_the_stated_rule():
    rows = [
        row(1, "p0", "first"),
        row(1, "c", "second"),
        row(2, "p0", "second"),
        row(2, "c", "first"),
    ]
    rows += [row(3, "p0", "second")]
    counted = count_votes(study_of(), rows)
    assert counted["excluded"] == {"1": "right on 0 of 1 control pairs"}
    assert counted["methods"]["nabla-0.7"]["overall"]["method"][0] == 1
    strict = count_votes(study_of(), rows, Exclusion(min_votes=2))
    assert set(strict["excluded"]) == {"1", "3"}
    assert "at least 2 pairs" in strict["rule"]


def judgement(rater, pair, outcome):
    return Judgement(
        rater, 0, pair, "m", False, False, False, dict.fromkeys(QUESTIONS, outcome), 1.0, ""
    )


def test_agreement_is_krippendorffs_alpha():
    # Krippendorff's own nominal example with two observers and ten units: alpha = 0.095.
    first, second = "0100000000", "1110010010"
    votes = [judgement(r, str(u), x[u]) for r, x in ((1, first), (2, second)) for u in range(10)]
    assert measure_agreement(votes, "overall") == pytest.approx(0.095, abs=5e-4)
    same = [judgement(r, str(u), str(u % 2)) for r in (1, 2, 3) for u in range(6)]
    assert measure_agreement(same, "overall") == 1
    assert measure_agreement(same[:6], "overall") is None


def test_least_shown_pairs_come_first_and_repeats_last():
    study = study_of(4)
    study = Study(**vars(study) | {"pairs_per_rater": 2, "num_repeats": 1})
    drawn = draw_assignments(study, {"p0": 5, "p1": 5}, random.Random(0))
    assert {s.pair_id for s in drawn[:3]} == {"p2", "p3", "c"}
    assert [s.is_repeat for s in drawn] == [False, False, False, True]


def test_the_damaged_video_looks_broken_to_the_judge_of_the_built_in_world(tmp_path):
    for seed in range(6):
        scene = sample_scene(seed, 1 + seed % 3)
        video = render(scene, 9, 128, 128)
        for name, frames in (("true", video), ("damaged", damage(video))):
            write_video(frames, tmp_path / f"{name}.mp4", fps=12)
        true, damaged = (
            score(read_video(tmp_path / f"{name}.mp4"), scene) for name in ("true", "damaged")
        )
        assert False not in [value for value in true.values() if isinstance(value, bool)], true
        assert true["outline"] > 0.95 and damaged["outline"] < 0.8, (seed, damaged)
        wrong = ("number", "colour", "shape", "background")
        assert not any(damaged[name] for name in wrong), (seed, damaged)


def test_a_damaged_video_keeps_its_shape_and_half_of_it_stands_still():
    video = np.random.default_rng(0).integers(255, size=(4, 33, 41, 3), dtype=np.uint8)
    damaged = damage(video)
    assert damaged.shape == video.shape
    assert damaged.dtype == np.uint8
    is_still = (damaged[0] == damaged[3]).all(axis=-1)
    assert is_still[:, :20].mean() > 0.3 > is_still[:, 20:].mean()
    assert np.array_equal(damaged, damage(video))


def test_a_study_is_made_from_a_run(tmp_path):
    run = write_run(tmp_path / "run", num_prompts=3, algos=("dense", "nabla-0.7", "sta-3-3-3"))
    study = make_study(tmp_path / "study", run, num_controls=2)
    assert study == Study.load(tmp_path / "study")
    assert sorted(study.methods) == ["nabla-0.7", "sta-3-3-3"]
    assert sum(pair.is_control for pair in study.pairs) == 2
    assert study.fps == 8
    names = {path.name for path in videos_folder(tmp_path / "study").iterdir()}
    assert len(names) == 2 * len(study.pairs)
    pair = study.pairs[0]
    stored = read_video(videos_folder(tmp_path / "study") / pair.baseline_video)
    assert any(np.array_equal(stored, read_video(path)) for path in (run / "dense").glob("*.mp4"))
    with pytest.raises(ValueError, match="already holds"):
        make_study(tmp_path / "study", run)
    with pytest.raises(ValueError, match=r"no pairs of dense with nabla-0\.2.*dense, nabla-0\.7"):
        make_study(tmp_path / "other", run, methods=["nabla-0.2"])
    with pytest.raises(ValueError, match="names an algorithm"):
        make_study(tmp_path / "other", run, title="is nabla-0.7 good?")
    with pytest.raises(ValueError, match="not found"):
        make_study(tmp_path / "other", tmp_path / "nowhere")


def test_every_method_asked_for_is_in_the_study_or_named_as_missing(tmp_path):
    run = write_run(tmp_path / "run", num_prompts=2)
    with pytest.raises(ValueError, match=r"with nabla-0\.2: it has videos of dense, nabla-0\.7\."):
        make_study(tmp_path / "study", run, methods=["nabla-0.7", "nabla-0.2"])
    assert not (tmp_path / "study").exists()
    assert make_study(tmp_path / "study", run, methods=["nabla-0.7"]).methods == ["nabla-0.7"]


def test_no_study_is_made_beside_the_votes_of_another(tmp_path):
    run = write_run(tmp_path / "run", num_prompts=1)
    votes = database_path(tmp_path / "study")
    votes.parent.mkdir()
    votes.write_bytes(b"of another study")
    with pytest.raises(ValueError, match=re.escape(str(votes))):
        make_study(tmp_path / "study", run)
    assert list(votes.parent.iterdir()) == [votes]
    assert votes.read_bytes() == b"of another study"


def test_exports(tmp_path):
    study = make_small_study(tmp_path, num_repeats=0)
    pairs = [pair.id for pair in study.pairs if not pair.is_control]
    rows = [row(r, pair, ("first", "both_good")[r % 2]) for r in (1, 2) for pair in pairs]
    counted = count_votes(study, rows)
    page = results_page(study, counted)
    assert "synthetic raters" in page
    assert "[0, 100]" in page
    lines = list(csv.DictReader(votes_csv(study, rows).splitlines()))
    assert len(lines) == 8
    assert {line["overall"] for line in lines} == {"baseline", "both_good"}
    draw_chart(counted, tmp_path / "chart.png")
    first = (tmp_path / "chart.png").read_bytes()
    draw_chart(counted, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes() == first
    with pytest.raises(ValueError, match="no votes"):
        draw_chart(count_votes(study, []), tmp_path / "none.png")
    RunRecord("vote", {}, 0, {}, "raters", counted)  # plain values only
