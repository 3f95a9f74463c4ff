import pytest

from nabla_attn.evaluation.compare import compare
from nabla_attn.generation.pipeline import load_pipeline
from nabla_attn.generation.request import GenerationRequest

REQUEST = GenerationRequest(prompt="a red circle", height=128, width=128, frames=5, steps=2)


@pytest.fixture(scope="module")
def pipeline(tiny_wan):
    return load_pipeline(tiny_wan, device="cpu", dtype="float32")


def test_dense_first_then_each_algorithm_once(pipeline):
    labels = []

    def start(label):
        labels.append(label)
        return lambda stage, done, total: None

    runs = compare(
        pipeline, REQUEST, ["nabla-0.1", "dense", "nabla-1.0", "nabla-0.1"], on_progress=start
    )
    assert [run.algo for run in runs] == ["dense", "nabla-0.1", "nabla-1"] == labels
    dense, sparse, full = (run.record.numbers["to_dense"] for run in runs)
    assert dense["psnr"] is None
    assert dense["speed_up"] == 1
    assert sparse["psnr"] < full["psnr"] if full["psnr"] else sparse["psnr"] > 0
    assert sparse["ssim"] <= full["ssim"] == pytest.approx(1, abs=1e-3)
    times = [run.record.numbers["seconds"]["transformer"] for run in runs]
    assert sparse["speed_up"] == pytest.approx(times[0] / times[1], abs=1e-3)


def test_rounds_run_in_turn_and_the_median_counts(pipeline):
    labels = []

    def start(label):
        labels.append(label)
        return lambda stage, done, total: None

    runs = compare(pipeline, REQUEST, ["nabla-0.1"], rounds=3, on_progress=start)
    assert labels == ["dense", "nabla-0.1"] * 3
    for run in runs:
        numbers = run.record.numbers
        assert len(numbers["rounds"]) == 3
        assert numbers["seconds"]["transformer"] == sorted(numbers["rounds"])[1]
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        compare(pipeline, REQUEST, ["nabla-0.1"], rounds=0)


def test_something_to_compare(pipeline):
    with pytest.raises(ValueError, match="nothing to compare"):
        compare(pipeline, REQUEST, ["dense"])
    with pytest.raises(ValueError, match="magic"):
        compare(pipeline, REQUEST, ["magic"])
