import json

import pytest

from nabla_attn.evaluation.vbench import (
    QUALITY,
    SEMANTIC,
    compute_totals,
    read_results,
    write_layout,
)

# The paper's Table 4 (arXiv:2507.13546): Wan2.1-14B, STA(18,24,24), NABLA(0.4), and
# NABLA(0.2)+STA(11,24,24). Its human action of STA is printed as 0.9, which is 90.
TABLE = {
    "subject consistency": (94.6, 95.00, 95.01, 93.18),
    "background consistency": (98.63, 98.44, 98.67, 98.25),
    "aesthetic quality": (67.27, 67.51, 67.10, 67.63),
    "imaging quality": (66.46, 66.18, 66.35, 66.28),
    "object class": (81.09, 82.12, 85.83, 82.91),
    "multiple objects": (70.57, 50.53, 66.23, 67.98),
    "color": (89.83, 85.61, 85.19, 92.22),
    "spatial relationship": (70.97, 66.45, 75.44, 70.07),
    "scene": (45.36, 48.11, 50.07, 51.38),
    "temporal style": (23.34, 22.95, 23.46, 22.99),
    "overall consistency": (25.80, 26.65, 26.10, 26.00),
    "human action": (95, 90, 91, 93),
    "temporal flickering": (98.91, 98.83, 98.88, 98.78),
    "motion smoothness": (98.38, 98.65, 98.53, 98.58),
    "dynamic degree": (70.83, 68.06, 68.05, 72.22),
    "appearance style": (22.69, 22.51, 23.18, 23.14),
}
TOTALS = (83.15, 82.45, 83.17, 83.19)


def column(index):
    return {name: values[index] / 100 for name, values in TABLE.items()}


@pytest.mark.parametrize("index", range(4))
def test_the_papers_columns_give_their_totals(index):
    assert compute_totals(column(index))["total"] == pytest.approx(TOTALS[index], abs=0.005)


def test_the_printed_parts_of_the_first_column():
    totals = compute_totals(column(0))
    assert totals["quality"] == pytest.approx(85.15, abs=0.05)
    assert totals["semantic"] == pytest.approx(75.23, abs=0.1)


def test_a_perfect_and_a_worst_model():
    limits = QUALITY | SEMANTIC
    assert compute_totals({n: high for n, (_, high, _) in limits.items()})["total"] == 100
    assert compute_totals({n: low for n, (low, _, _) in limits.items()})["total"] == 0


def test_percent_for_shares_is_refused():
    scores = column(0)
    with pytest.raises(ValueError, match=r"imaging quality must be in \[0, 1\], got 66"):
        compute_totals(scores | {"imaging quality": 66.46})
    del scores["scene"]
    with pytest.raises(ValueError, match="missing scene"):
        compute_totals(scores)
    with pytest.raises(ValueError, match="unknown beauty"):
        compute_totals(column(0) | {"beauty": 0.5})


def test_result_files_are_read_back(tmp_path):
    values = {name.replace(" ", "_"): [score, []] for name, score in column(2).items()}
    halves = dict(list(values.items())[:8]), dict(list(values.items())[8:])
    for index, half in enumerate(halves):
        (tmp_path / f"run{index}_eval_results.json").write_text(json.dumps(half))
    assert compute_totals(read_results(tmp_path))["total"] == pytest.approx(83.17, abs=0.005)
    (tmp_path / "again_eval_results.json").write_text(json.dumps(halves[0]))
    with pytest.raises(ValueError, match="in another file too"):
        read_results(tmp_path)
    (tmp_path / "again_eval_results.json").write_text("[1]")
    with pytest.raises(ValueError, match="again_eval_results"):
        read_results(tmp_path)
    with pytest.raises(ValueError, match="vbench evaluate"):
        read_results(tmp_path / "nothing")


def test_layout(tmp_path):
    from tests.vote.study_helpers import write_run

    write_run(tmp_path / "run", num_prompts=2, prompt="a cat, number {}")
    assert write_layout(tmp_path / "run", tmp_path / "v") == {"dense": 2, "nabla-0.7": 2}
    assert (tmp_path / "v" / "dense" / "a cat, number 1-0.mp4").is_file()
    prompts = json.loads((tmp_path / "v" / "dense" / "prompts.json").read_text())
    assert prompts["a cat, number 0-0.mp4"] == "a cat, number 0"
    write_run(tmp_path / "bad", num_prompts=1, prompt="../../../escape {}")
    with pytest.raises(ValueError, match="cannot be a file name"):
        write_layout(tmp_path / "bad", tmp_path / "w")
