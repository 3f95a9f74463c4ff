import pytest

from nabla_attn.evaluation.run import peak_memory
from nabla_attn.generation import placement
from nabla_attn.generation.generate import generate
from nabla_attn.generation.pipeline import load_pipeline
from nabla_attn.generation.placement import check_memory, least_memory
from nabla_attn.generation.request import GenerationRequest

SMALL = GenerationRequest("red", height=64, width=64, frames=5, steps=1, sparse_algo="nabla-0.5")


@pytest.fixture(scope="module")
def pipeline(tiny_wan):
    return load_pipeline(tiny_wan, device="cpu", dtype="float32")


def test_the_bound_is_below_what_is_measured(pipeline):
    with peak_memory(pipeline.device) as found:
        generate(pipeline, SMALL)
    if found["bytes"] is None:
        pytest.skip("this system does not tell its peak memory")
    assert sum(least_memory(pipeline, SMALL).values()) < found["bytes"]


def test_the_bound_by_hand(pipeline):
    # 2 x 4 x 4 tokens of 2 heads of 16 floats, in 2 blocks of 8 x 8 tokens.
    expected = {"attention": 32 * 32 * 5 * 4 + 2 * 2**2, "video": 5 * 64 * 64 * 3 * 9}
    assert least_memory(pipeline, SMALL) == expected


@pytest.mark.parametrize(("free", "name"), [(100_000, "video"), (1000, "attention")])
def test_what_cannot_fit_is_refused_with_the_numbers(pipeline, monkeypatch, free, name):
    check_memory(pipeline, SMALL)
    monkeypatch.setattr(placement, "_free", lambda device: free)
    message = f"5 frames of 64x64 take at least .* GiB for the {name}, and .* are free on the cpu"
    with pytest.raises(ValueError, match=message):
        check_memory(pipeline, SMALL)
