from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from nabla_attn import apply
from nabla_attn.generation.generate import generate, warm_up
from nabla_attn.generation.pipeline import load_pipeline
from nabla_attn.generation.request import GenerationRequest
from nabla_attn.record import RunRecord

REQUEST = GenerationRequest(
    prompt="a red circle moving right", height=128, width=176, frames=9, steps=3, seed=5
)


@pytest.fixture(scope="module")
def pipeline(tiny_wan):
    return load_pipeline(tiny_wan, device="cpu", dtype="float32")


@pytest.mark.parametrize("algo", ["dense", "nabla-0.4"])
def test_same_seed_same_bytes(pipeline, algo):
    request = REQUEST.with_algo(algo)
    first, record = generate(pipeline, request)
    again, _ = generate(pipeline, request)
    assert first.shape == (9, 128, 176, 3)
    assert first.dtype == np.uint8
    assert first.std() > 1
    assert first.tobytes() == again.tobytes()
    assert RunRecord.from_json(record.to_json()) == record


@pytest.fixture
def stochastic(pipeline):
    """A pipeline whose scheduler draws noise in every step and is given no generator."""
    own = pipeline.scheduler
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    yield pipeline
    pipeline.scheduler = own


def test_noise_within_steps_follows_from_the_seed_too(stochastic):
    first, _ = generate(stochastic, REQUEST)
    torch.randn(3)
    again, _ = generate(stochastic, REQUEST)
    everything, _ = generate(stochastic, REQUEST.with_algo("nabla-1.0"))
    other, _ = generate(stochastic, replace(REQUEST, seed=6))
    assert first.tobytes() == again.tobytes()
    # Sparse attention that keeps everything differs by rounding, not by other noise.
    distances = (np.abs(first.astype(int) - video).max() for video in (everything, other))
    assert next(distances) <= 1 < next(distances)


def test_random_numbers_outside_go_on_as_if_nothing_was_drawn(stochastic):
    torch.manual_seed(1)
    wanted = torch.randn(4)
    torch.manual_seed(1)
    generate(stochastic, REQUEST)
    assert torch.equal(torch.randn(4), wanted)


def test_seed_and_algorithm_matter(pipeline):
    dense, _ = generate(pipeline, REQUEST)
    other, _ = generate(pipeline, replace(REQUEST, seed=6))
    sparse, _ = generate(pipeline, REQUEST.with_algo("nabla-0.1"))
    assert not np.array_equal(dense, other)
    assert not np.array_equal(dense, sparse)


def test_the_record_holds_what_was_run(pipeline, tiny_wan):
    _, record = generate(pipeline, REQUEST.with_algo("nabla-0.4"))
    assert record.config["sparse_algo"] == "nabla-0.4"
    assert record.config["model"] == str(tiny_wan)
    assert record.config["dtype"] == "float32"
    assert record.seed == 5
    seconds, attention = record.numbers["seconds"], record.numbers["attention"]
    assert len(seconds["transformer_steps"]) == 3
    assert sum(seconds["transformer_steps"]) == pytest.approx(seconds["transformer"], abs=1e-3)
    parts = seconds["text"] + seconds["transformer"] + seconds["decode"]
    assert 0 < parts <= seconds["total"] + 1e-3
    assert min(seconds[name] for name in ("text", "transformer", "decode")) > 0
    assert np.shape(attention["density_per_step_and_layer"]) == (3, 2)
    assert 0 < attention["density"] < 1
    assert record.numbers["tokens"] == {"frames": 3, "height": 8, "width": 11}


def test_dense_is_not_hooked(pipeline):
    _, record = generate(pipeline, REQUEST)
    assert record.numbers["attention"]["density"] == 1.0


def test_what_a_pipeline_was_loaded_with_comes_back(pipeline):
    dense, _ = generate(pipeline, REQUEST.with_algo("dense"))
    sparse, _ = generate(pipeline, REQUEST.with_algo("nabla-0.3"))
    with apply(pipeline, "topk-0.9") as handle:
        again, record = generate(pipeline, REQUEST.with_algo("dense"))
        assert np.array_equal(again, dense) and record.numbers["attention"]["density"] == 1
        assert np.array_equal(generate(pipeline, REQUEST.with_algo("nabla-0.3"))[0], sparse)
        assert "removed" not in repr(handle)


def test_nothing_stays_behind(pipeline):
    before = [type(block.attn1.processor) for block in pipeline.transformer.blocks]
    generate(pipeline, REQUEST.with_algo("nabla-0.4"))
    warm_up(pipeline, REQUEST.with_algo("sta-1-1-1"))
    assert [type(block.attn1.processor) for block in pipeline.transformer.blocks] == before
    assert not pipeline.transformer._forward_hooks
    assert not pipeline.transformer._forward_pre_hooks


def test_a_stopped_run_restores_the_model(pipeline):
    before = [type(block.attn1.processor) for block in pipeline.transformer.blocks]

    def stop(stage, done, total):
        if (stage, done) == ("denoise", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(pipeline, REQUEST.with_algo("nabla-0.4"), on_progress=stop)
    assert [type(block.attn1.processor) for block in pipeline.transformer.blocks] == before
    assert not pipeline.transformer._forward_hooks


def test_progress_tells_every_stage_and_step(pipeline):
    told = []
    generate(pipeline, REQUEST, on_progress=lambda *event: told.append(event))
    steps = [("denoise", done, 3) for done in range(4)]
    assert told == [("text", 0, 1), *steps, ("decode", 0, 1), ("done", 1, 1)]


def test_overflow_is_an_error_and_not_a_black_video(pipeline, monkeypatch):
    bias = pipeline.transformer.proj_out.bias
    monkeypatch.setattr(bias, "data", torch.full_like(bias, torch.nan))
    with pytest.raises(ValueError, match="overflowed"):
        generate(pipeline, REQUEST)


def test_one_frame(pipeline):
    frames, record = generate(pipeline, replace(REQUEST, frames=1, steps=1, guidance=1.0))
    assert frames.shape == (1, 128, 176, 3)
    assert record.numbers["tokens"]["frames"] == 1
