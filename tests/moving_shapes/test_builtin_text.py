import pytest
import torch

from nabla_attn.moving_shapes import describe, sample_scene
from nabla_attn.moving_shapes.transformer import (
    PIPELINE_TOKENS,
    CaptionEncoder,
    PadWeight,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    insert_blocks,
)


@pytest.fixture(scope="module")
def encode():
    return CaptionEncoder(build_tokenizer(), build_text_encoder(0), num_tokens=14)


def test_every_caption_is_made_of_known_words():
    tokenizer = build_tokenizer()
    for seed in range(60):
        tokens = tokenizer(describe(sample_scene(seed, 1 + seed % 3))).input_ids
        assert tokenizer.unk_token_id not in tokens and tokens[-1] == tokenizer.eos_token_id
    assert tokenizer("a zebra").input_ids[1] == tokenizer.unk_token_id
    assert tokenizer("A RED Circle").input_ids == tokenizer("a red circle").input_ids


def test_padding_is_zeros_as_in_the_pipeline(encode):
    embedded = encode(["", "a red circle moving right"])
    assert embedded.shape == (2, 14, 64)
    assert embedded[0, 0].any() and not embedded[0, 1:].any()
    assert embedded[1, 5].any() and not embedded[1, 6:].any()


def test_long_captions_are_refused(encode):
    with pytest.raises(ValueError, match="text_tokens"):
        encode([describe(sample_scene(0, 3))])


def test_one_weighted_pad_equals_the_padding_of_the_pipeline(encode):
    model = build_transformer(0).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    text = encode(["a red circle moving right", ""])
    padded = torch.cat([text, text.new_zeros(2, PIPELINE_TOKENS - 14, 64)], 1)
    latents, times = torch.randn(2, 16, 2, 4, 4), torch.tensor([900.0, 100.0])
    pads = PadWeight(14)
    pads.set(1.0)
    with torch.no_grad():
        expected = model(latents, times, padded, return_dict=False)[0]
        with pads.applied(model):
            weighted = model(latents, times, text, return_dict=False)[0]
        plain = model(latents, times, text, return_dict=False)[0]
    assert torch.allclose(weighted, expected, atol=1e-4)
    assert not torch.allclose(plain, expected, atol=1e-2)


def test_pad_weight_of_zero_changes_nothing(encode):
    model = build_transformer(0).eval()
    latents, times = torch.randn(1, 16, 1, 2, 2), torch.tensor([500.0])
    with torch.no_grad():
        before = model(latents, times, encode([""]), return_dict=False)[0]
        with PadWeight(14).applied(model):
            inside = model(latents, times, encode([""]), return_dict=False)[0]
    assert torch.equal(before, inside)


def test_a_deeper_model_computes_the_same_and_learns_in_its_new_blocks(encode):
    torch.manual_seed(0)
    model = build_transformer(0).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    deeper = insert_blocks(model, (3, 5)).eval()
    assert deeper.config.num_layers == len(deeper.blocks) == 8
    for old, new in zip((0, 1, 2, 3, 4, 5), (0, 1, 2, 4, 6, 7), strict=True):
        weights = (m.blocks[i].ffn.net[2].weight for m, i in ((model, old), (deeper, new)))
        assert torch.equal(*weights), f"block {old} is block {new} now"
    inputs = torch.randn(2, 16, 2, 4, 4), torch.tensor([900.0, 100.0]), encode(["", "a red circle"])
    found = deeper(*inputs, return_dict=False)[0]
    with torch.no_grad():
        assert torch.allclose(found, model(*inputs, return_dict=False)[0], atol=1e-5)
    found.square().sum().backward()
    assert deeper.blocks[3].ffn.net[2].weight.grad.any()
