"""The generated parts of docs/methods.md: tables, leaders, correlations, the figure."""

from math import log
from pathlib import Path

import pytest
from benchmarks.pages import board_figure, methods
from benchmarks.pages.board import build_board, errors_in_time, method_of
from benchmarks.pages.judged import build_judged
from benchmarks.pages.matrix import build_matrix, parts_of, shared_density, worth_of_parts
from benchmarks.pages.paired import as_good_as, interval, read_at

from nabla_attn.evaluation.leaderboard import read_records, rows_of
from nabla_attn.record import RunRecord

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
CONFIG = {"frames": 33, "steps": 6}


def entry(density, error, seconds, **more):
    plain = {"density": density, "recall": 1 - error, "error": error, "select_seconds": 0.001}
    return plain | {"seconds": seconds, "reference_seconds": 0.01} | more


def records(*prompts, config=CONFIG):
    found = [{"algorithms": each, "reference": "topk-0.1"} for each in prompts]
    return [RunRecord("leaderboard", config, 0, {}, "cpu", each) for each in found]


def prompt(shift=0.0):
    """topk errs less than nabla, which is faster; sta-1-3-3 is slower and worse than sta-1-1-1."""
    return {
        "dense": entry(1.0, 0.0, 0.1),
        "topk-0.1": entry(0.1, 0.4 + shift, 0.02),
        "topk-0.2": entry(0.2, 0.2 + shift, 0.04),
        "nabla-0.3": entry(0.1, 0.5 + shift, 0.01),
        "nabla-0.5": entry(0.2, 0.3 + shift, 0.02),
        "sta-1-1-1": entry(0.1, 0.6 + shift, 0.01),
        "sta-1-3-3": entry(0.2, 0.7 + shift, 0.02),
    }


def test_a_line_is_read_between_its_points():
    line = [(1.0, 4.0), (100.0, 2.0)]
    assert read_at(line, 10.0) == pytest.approx(3.0)
    assert read_at(line, 0.9) is None and read_at(line, 101) is None and read_at([], 1) is None
    assert read_at(line, 101, slack=0.05) == 2.0


def test_intervals_are_paired():
    low, high = interval([1.0, 2.0, 3.0])
    assert (low + high) / 2 == pytest.approx(2) and high - low == pytest.approx(2 * 2.484, abs=0.01)
    assert interval([1.0]) is None
    values = {"a": [1.0, 5.0, 9.0], "b": [1.1, 5.1, 9.1], "c": [0.9, 5.2, 9.1]}
    assert as_good_as("a", values) == ["c"]


def test_the_board_says_who_leads_at_a_density_and_in_a_time():
    text = "\n".join(build_board(records(prompt(), prompt(0.01), prompt(0.02))))
    assert "| 10% | `topk-0.1` | 0.410 | none | `topk-0.1` |" in text
    assert "Milliseconds are the median ratio to `topk-0.1`" in text
    assert "`topk-0.1` | 10.0% | 0.590 | 0.410 ± 0.006 | 1 | 20 | 0.50 |" in text
    assert "| `nabla` | 0.510 | 0.310 | - |" in text
    assert "| 10% of dense | `nabla` | 0.510 | none |" in text
    assert "| 20% of dense | `nabla` | 0.310 | none |" in text
    assert "| 30% of dense | `topk`" in text and "50% of dense" not in text


def test_errors_in_a_time_are_not_read_beyond_what_was_measured():
    rows = rows_of(records(prompt(), prompt(0.02)))
    assert set(errors_in_time(rows, 0.01)) == {"nabla", "sta"}
    assert set(errors_in_time(rows, 0.02)) == {"topk", "nabla"}
    assert errors_in_time(rows, 0.2) == {}
    assert errors_in_time(rows, 0.04)["topk"] == pytest.approx([0.2, 0.22])
    assert errors_in_time(rows, 0.014)["nabla"][0] == pytest.approx(0.4, abs=0.01)


def test_one_prompt_has_no_interval_and_old_records_have_no_reference():
    (one,) = records(prompt())
    for each in one.numbers["algorithms"].values():
        del each["reference_seconds"]
    del one.numbers["algorithms"]["dense"], one.numbers["reference"]
    text = "\n".join(build_board([one]))
    assert "a single one has no interval" in text and "share of ideal" not in text
    assert "At equal seconds" not in text and "Milliseconds are" not in text
    assert build_board(read_records(RESULTS / "methods"))


def test_heads_of_a_synthetic_set_have_columns():
    config = {"data": "synthetic", "tokens": [2, 3, 4], "steps": 2, "heads": ["a"], "dim": 8}
    heads = {"error_of_heads": {"a": 0.25}}
    text = "\n".join(
        build_board(records({"topk-0.1": entry(0.1, 0.4, 1.0, **heads)}, config=config))
    )
    assert "| error, a |" in text and "| 0.250 |" in text and "2x3x4 tokens" in text


def test_the_worth_of_a_part_is_the_mean_change_of_pairs_that_differ_in_it_alone():
    def line(rule, suffix, worth, kept=1.0):
        densities = (0.1, 0.2)
        return {
            f"{rule}-{d}{suffix}": entry(d * kept, worth * (1 - log(d * kept / 0.12)), 0.01)
            for d in densities
        }

    lines = line("topk", "", 0.4) | line("topk", "_tail-mean", 0.2)
    lines |= line("topk", "_order-hilbert", 0.44) | line("topk", "_order-hilbert_tail-mean", 0.22)
    # It keeps more pairs, which its lower errors must not be praised for.
    lines |= line("nabla", "", 0.8, kept=1.2)
    twice = {name: each | {"error": 2 * each["error"]} for name, each in lines.items()}
    prompts = [lines, twice]
    assert parts_of("topk-0.1_order-hilbert_tail-mean") == {
        "rule": "topk",
        "order": "hilbert",
        "tail": "mean",
    }
    rows = rows_of(records(*prompts))
    assert shared_density(rows) == pytest.approx((0.12 * 0.2) ** 0.5)
    assert worth_of_parts(rows, 0.15) == [
        ["rule `nabla`", "`topk`", "+100.0%", "+100.0% to +100.0%", "1"],
        ["order `hilbert`", "`tiles`", "+10.0%", "+10.0% to +10.0%", "2"],
        ["tail `mean`", "`none`", "-50.0%", "-50.0% to -50.0%", "2"],
    ]
    text = "\n".join(build_matrix(records(*prompts)))
    assert "worth at 15.5% of the token pairs" in text and "Not below" not in text
    del prompts[1]["nabla-0.2"]
    assert "some prompts lack them: `nabla-0.2`" in "\n".join(build_matrix(records(*prompts)))
    # At one density alone nothing can be read between.
    worth = worth_of_parts(rows_of(records(*prompts)), 0.15)
    assert [line[0] for line in worth] == ["order `hilbert`", "tail `mean`"]
    assert shared_density([]) is None


def judged(errors, measure):
    """Videos as good as a measure says, and a leaderboard of the same algorithms."""
    videos = {"dense": video(0.0, 1.0)}
    videos |= {name: video(*measure(density, error)) for name, (density, error) in errors.items()}
    board = {name: entry(density, error, 0.01) for name, (density, error) in errors.items()}
    for number, each in enumerate(board.values()):
        each["recall"] = (number * 5 % len(board)) / 10
    config = CONFIG | {"model": "m"}
    numbers = {"algorithms": videos}
    return RunRecord("judged", config, 0, {}, "cpu", numbers), records(board, board)


def video(squared, density):
    def one(index):
        value = squared * (1 + index / 10)
        return {
            "psnr": value,
            "ssim": 1 - value,
            "motion_ssim": 1 - value,
            "judge_all": 1.0,
            "judge_outline": 1 - value,
            "density": density,
            "seconds": 1.0,
        }

    return {f"prompt {index}": one(index) for index in range(4)}


NAMES = ("topk", "nabla", "sol", "draft")
ERRORS = {
    f"{name}-{density}": (density, base + more)
    for density, base in ((0.1, 0.4), (0.2, 0.2))
    for name, more in zip(NAMES, (0, 0.02, 0.05, 0.1), strict=True)
}


def test_what_ranks_as_the_videos_do_is_said_in_words():
    run, board = judged(ERRORS, lambda density, error: (error, density))
    text = "\n".join(build_judged(run, board))
    assert "over 8 settings of 4 methods" in text
    assert "| relative error | 1.00 (1.00 to 1.00)" in text
    assert "SSIM to dense: relative error ranks most alike (1.00)" in text
    assert "Relative error ranks better than exact mass" in text
    # Every video is right, so that this verdict has no ranks.
    assert "all right:" not in text and "| - |" not in text.split("#### Over all")[1]
    assert "| `dense` | 100.0% | - | 1.0000 | 100% | 1.000 |" in text
    assert "| 10% | SSIM to dense | `topk-0.1` | `nabla-0.1` | 0." in text


def test_density_foretells_nothing_where_all_have_the_same():
    run, board = judged(ERRORS, lambda density, error: (error, density))
    whole, within = "\n".join(build_judged(run, board)).split("#### About one density")
    assert "| pairs kept |" in whole.split("#### Over all")[1]
    assert "| pairs kept |" not in within and "| relative error | 1.00" in within


def test_too_few_algorithms_are_not_ranked():
    few = dict(list(ERRORS.items())[:2])
    run, board = judged(few, lambda density, error: (error, density))
    assert build_judged(run, board)[-1].startswith("2 of them are on the leaderboard, too few")
    assert build_judged(run, [])[-1].endswith("too few to rank.")


def test_every_method_has_its_name_in_a_panel(tmp_path):
    rows = rows_of(records(prompt(), prompt(0.01)))
    for name in ("a.svg", "b.svg"):
        board_figure.draw(tmp_path / name, rows, is_dark=False)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    for method in ("topk", "nabla", "sta"):
        assert text.count(f">{method}</text>") == 1
    for group in ("share", "mass", "pattern"):
        assert board_figure.GROUPS[group].split(":")[0] in text
    assert method_of("topk-0.1_order-hilbert_tail-mean") == "topk_order-hilbert_tail-mean"


def test_every_method_of_the_package_has_a_panel():
    from nabla_attn.methods import NAMES

    found = {name: board_figure.group_of(name) for name in NAMES}
    assert set(found.values()) == set(board_figure.GROUPS)
    assert found["sta"] == found["svg"] == "pattern" and found["chipmunk"] == "share"
    assert found["nabla"] == found["svg2"] == "mass"


def test_labels_are_moved_apart_as_little_as_may_be():
    assert board_figure.spread([0.1, 0.5], 0.1) == [0.1, 0.5]
    moved = board_figure.spread([0.5, 0.5, 0.9], 0.1)
    assert moved == pytest.approx([0.45, 0.55, 0.9])
    chained = board_figure.spread([0.4, 0.5, 0.5], 0.1)
    assert chained == pytest.approx([11 / 30, 14 / 30, 17 / 30])


def test_parts_without_records_stay_as_they_are(tmp_path):
    page = tmp_path / "methods.md"
    names = ("list", "board", "synthetic", "matrix", "matrix_synthetic", "judged")
    text = "".join(f"<!-- {name}: begin -->\nold {name}\n<!-- {name}: end -->\n" for name in names)
    page.write_text(text)
    methods.write_parts(page, tmp_path)
    found = page.read_text()
    assert "old list" not in found and "| method | what it is |" in found
    assert all(f"old {name}" in found for name in names[1:])
    page.write_text("no marks")
    with pytest.raises(ValueError, match="the page has no '<!-- list: begin -->'"):
        methods.write_parts(page, tmp_path)
