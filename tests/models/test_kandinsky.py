"""Kandinsky checkpoints trained with NABLA: their settings, and diffusers' own path."""

import pytest
import torch
from tests.models.tiny_models import TINY, relative_error, run
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import BlockMask

import nabla_attn as na
from nabla_attn.models.modules import trained_algorithm

GRID = (3, 16, 24)
TRAINED = dict(
    attention_type="nabla", attention_P=0.4, attention_wT=1, attention_wH=1, attention_wW=3
)


@pytest.fixture
def flex(monkeypatch):
    """Make diffusers' NABLA right on CPU: compile FlexAttention, and give it unaliased tables."""
    original = BlockMask.from_kv_blocks

    def unaliased(partial_counts, partial, full_counts, full, **kwargs):
        return original(partial_counts, partial, full_counts, full.clone(), **kwargs)

    monkeypatch.setattr(BlockMask, "from_kv_blocks", staticmethod(unaliased))
    compiled = torch.compile(flex_attention.flex_attention)
    monkeypatch.setattr(flex_attention, "flex_attention", compiled)


@torch.no_grad()
def test_kandinsky5_equals_diffusers_own_nabla(flex):
    tiny = TINY["kandinsky5"]
    model = tiny.build(**TRAINED)
    from diffusers import Kandinsky5T2VPipeline

    inputs = tiny.inputs(*GRID)
    parts = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler")
    pipeline = Kandinsky5T2VPipeline(transformer=model, **dict.fromkeys(parts))
    sparse_params = pipeline.get_sparse_params(inputs["hidden_states"], "cpu")
    with na.apply(model):
        # What the pipeline would pass is not needed, and replaced where it is passed.
        ours = run(model, inputs | {"sparse_params": sparse_params})
        assert torch.equal(ours, run(model, inputs))
        assert run(model, tiny.inputs(3, 11, 13)).isfinite().all()
    dense = run(model, inputs)
    model.visual_transformer_blocks[0].self_attention.processor._attention_backend = "flex"
    theirs = run(model, inputs | {"sparse_params": sparse_params})
    assert relative_error(ours, theirs) < 1e-5
    assert relative_error(ours, dense) > 1e-3


@torch.no_grad()
def test_kandinsky6_sr_equals_diffusers_own_nabla(flex):
    tiny = TINY["kandinsky6-sr"]
    model, inputs = tiny.build(num_visual_blocks=1), tiny.inputs(*GRID)
    with na.apply(model) as handle:
        ours = run(model, inputs)
        assert handle.report().mean_density < 0.9
    assert relative_error(ours, run(model, inputs)) < 1e-5


@torch.no_grad()
def test_tokens_that_come_in_blocks_stay_in_them():
    tiny = TINY["kandinsky6-sr"]
    model, inputs = tiny.build(num_visual_blocks=1), tiny.inputs(*GRID)
    with (
        na.apply(model, "nabla-0.5_block-2-4-4"),
        pytest.raises(ValueError, match=r"tokens in blocks of 1x8x8: got nabla-0.5_block-2-4-4"),
    ):
        run(model, inputs)
    with na.apply(model, "nabla-0.5_block-1-8-8"):
        same = run(model, inputs)
    with na.apply(model, "nabla-0.5"):
        assert torch.equal(same, run(model, inputs))


def test_settings_of_checkpoints():
    build = TINY["kandinsky5"].build
    assert str(trained_algorithm(build(**TRAINED))) == "nabla-0.4_sta-1-1-3"
    assert str(trained_algorithm(build(attention_type="nabla", attention_P=0.9))) == "nabla-0.9"
    assert trained_algorithm(build()) is None
    kandinsky6 = TINY["kandinsky6"].build()
    kandinsky6.register_to_config(**TRAINED)
    assert str(trained_algorithm(kandinsky6)) == "nabla-0.4_sta-1-1-3"
    assert str(trained_algorithm(TINY["kandinsky6-sr"].build())) == "nabla-0.5_sta-1-1-1"
    wan = TINY["wan"].build()
    wan.register_to_config(sparse_algo="nabla-0.6_sta-11-3-3")
    assert str(trained_algorithm(wan)) == "nabla-0.6_sta-11-3-3"
