from benchmarks.pages.correctness import JUDGED, build_page

from nabla_attn.record import RunRecord


def save(folder, name, density, **config):
    size = {"height": 128, "width": 128, "frames": 61, "steps": 6, "guidance": 3.0}
    summary = {"right": dict.fromkeys(JUDGED, 0.5), "density": density}
    numbers = {"count": 8, "summary": summary}
    RunRecord("judge", size | config, 0, {"torch": "2"}, "a device", numbers).save(
        folder / f"judge_{name}.json"
    )


def test_judged_models_are_told_apart_densest_first(tmp_path):
    save(tmp_path, "a", 0.25, sparse_algo="nabla-0.4", model="builtin", lora="abc", guidance=3.5)
    save(tmp_path, "b", 0.2, sparse_algo="nabla-0.4", model="runs/student")
    save(tmp_path, "c", 1.0, sparse_algo="dense", model="builtin")
    page = build_page(tmp_path)
    rows = [line.split(" | ") for line in page.splitlines() if "| 8 |" in line]
    assert [(row[0], row[1]) for row in rows] == [
        ("| dense", "3"),
        ("| nabla-0.4, adapters", "3.5"),
        ("| nabla-0.4, distilled", "3"),
    ]
