from benchmarks.pages import quality
from tests.viz.test_report import write_run

from nabla_attn.record import RunRecord

LOOKS = {"outline": 0.86, "outline_min": 0.7, "holes": 0.0, "fragments": 0.01, "stains": 0.0}


def look(ssim, outline):
    return {"ssim": ssim, "outline": outline}


def write_judged(folder, algorithm, captions, density, first, side):
    right = {"number": True, "shape": False, "direction": True} | LOOKS
    prompts = [{"prompt": "a", "right": right, "density": density} for _ in range(4)]
    if first:
        for prompt in prompts:
            prompt["first_judge"] = {"number": True, "shape": True}
    means = {name: float(value) for name, value in right.items()}
    numbers = {"summary": {"right": means, "density": density}, "prompts": prompts}
    config = {
        "sparse_algo": algorithm,
        "captions": captions,
        "judge": "2",
        "height": side,
        "width": side,
    }
    RunRecord("judge", config, 0, {}, "a CPU", numbers).save(
        folder / f"judge-2_{captions}_{algorithm}.json"
    )


def test_both_judges_stand_in_one_table(tmp_path):
    records, page = tmp_path / "results", tmp_path / "docs" / "quality.md"
    write_run(records / "quality")
    write_judged(records, "nabla-0.7", "trained", 0.4, first=False, side=256)
    write_judged(records / quality.FIRST_MODEL, "dense", "held-out", 1.0, first=True, side=128)
    rows = [
        {"name": "VAE alone", "captions": "held-out", "frames": 1, "steps": 0, "count": 4,
         "outline": 0.97, "outline_min": 0.97, "shape": 1.0, "psnr": 30.0},
        {"name": "generated, 1 frame", "captions": "trained", "frames": 1, "steps": 6, "count": 4,
         "outline": 0.9, "outline_min": 0.9, "shape": 0.25},
    ]  # fmt: skip
    size = {"height": 128, "width": 128}
    RunRecord("outline limits", size, 0, {}, "a CPU", {"rows": rows}).save(
        records / quality.FIRST_MODEL / "outline_limits.json"
    )
    quality.write_page(page, records)
    text = page.read_text()
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if " | 0.860 | " in line]
    looks = ["0%", "100%", "0.860", "0.700", "1.0%", "0.0%"]
    assert cells == [
        ["256x256", "nabla-0.7", "trained", "4", "40.0%", "", "0%", "", *looks],
        ["128x128", "dense", "held-out", "4", "100.0%", "100%", "0%", "100%", *looks],
    ]
    assert "| VAE alone | held-out | 1 |  | 4 | 0.970 | 0.970 | 100% | 30.0 |" in text
    assert "0.970 to 0.970. Generated" in text and "1 frame: 0.900 trained" in text
    assert "## Verdict of the first judge" in text and "version 1 of the judge" in text


def test_tails_stand_before_the_first_study(tmp_path):
    records, page = tmp_path / "results", tmp_path / "docs" / "quality.md"
    write_run(records / "quality")
    write_run(
        records / "quality_tails",
        algorithms=(("dense", 1.0), (quality.BEFORE_TAILS, 0.2), ("topk-0.1", 0.1)),
    )
    rows = [
        {"dense": look(1.0, 0.9), "no tail": look(0.8, 0.8), "mean": look(0.7, 0.75)},
        {"dense": look(1.0, 0.8), "no tail": look(0.9, 0.8), "mean": look(0.6, 0.85)},
    ]
    config = {"width": 128, "height": 64, "frames": 9}
    numbers = {"results": [{"prompt": "a", "rows": each} for each in rows]}
    RunRecord("tail_steps", config, 0, {}, "a CPU", numbers).save(records / "tail_steps.json")
    quality.write_page(page, records)
    text = page.read_text()
    titles = [
        "## Dropped blocks estimated",
        "## When a tail helps",
        "## Verdict of the first judge",
    ]
    places = [text.index(title) for title in titles]
    assert places == sorted(places)
    same = "+0.000 \\[+0.000, +0.000\\]"
    assert f"| topk-0.1 | 10.0% | 0.0% | {same} | {same} | 0.50 |" in text
    assert "| mean | 0.650 | -0.200 \\[-1.471, +1.071\\] | 0.800 |" in text
    assert "| no tail | 0.850 |  | 0.800 |" in text
    assert "2 held-out prompts, 128x64, 9 frames." in text
    assert (page.parent / "quality-images" / "tails-curves.png").is_file()
