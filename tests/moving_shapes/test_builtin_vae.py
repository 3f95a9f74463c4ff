import random

import pytest
import torch

from nabla_attn.moving_shapes.loop import step_at
from nabla_attn.moving_shapes.recipe import VaeConfig, VaePhase
from nabla_attn.moving_shapes.vae import (
    build_vae,
    decode_open,
    draw_crops,
    encode_mean,
    is_hidden_convolution,
    phase_at,
    vae_loss,
)

CONFIG = VaeConfig(
    (
        VaePhase(steps=2, batch=2, frames=1, size=16, largest=64),
        VaePhase(steps=1, batch=1, frames=5, size=16, largest=16),
    )
)


@pytest.fixture(scope="module")
def vae():
    return build_vae(0)


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_strides(vae, frames):
    with torch.no_grad():
        latents = encode_mean(vae, torch.zeros(1, 3, frames, 32, 16))
        assert latents.shape == (1, 16, 1 + frames // 4, 4, 2)
        assert decode_open(vae, latents).shape == (1, 3, frames, 32, 16)


def test_open_decode_is_decode_before_the_clamp(vae):
    latents = torch.randn(2, 16, 2, 2, 3)
    with torch.no_grad():
        assert torch.equal(decode_open(vae, latents).clamp(-1, 1), vae.decode(latents).sample)


def test_time_starts_as_a_copy_of_the_present(vae):
    image = torch.rand(1, 3, 1, 32, 32)
    still = image.expand(-1, -1, 5, -1, -1)
    with torch.no_grad():
        lone, clip = encode_mean(vae, image)[:, :, 0], encode_mean(vae, still)[:, :, 1]
    assert torch.nn.functional.cosine_similarity(lone.flatten(), clip.flatten(), 0) > 0.8


def test_phases_follow_each_other():
    assert [phase_at(CONFIG, step).frames for step in range(3)] == [1, 1, 5]
    assert CONFIG.steps == 3


@pytest.mark.parametrize("step", [0, 2])
def test_loss_reaches_every_used_weight(step):
    model = build_vae(0)
    loss = vae_loss(model, CONFIG, step_at(0, "vae", step, 3))
    loss.backward()
    assert loss.isfinite()
    grads = {name for name, p in model.named_parameters() if p.grad is not None}
    timed = {name for name, _ in model.named_parameters() if "time_conv" in name}
    everything = {name for name, _ in model.named_parameters()}
    assert grads == (everything - timed if step == 0 else everything)


def test_crops_show_shapes():
    phase = VaePhase(steps=1, batch=16, frames=1, size=32, largest=128)
    video, background = draw_crops(phase, random.Random(0))
    assert video.shape == (16, 3, 1, 32, 32) and video.abs().max() <= 1
    distance = (video - background[:, :, None, None, None]).abs().amax((1, 2, 3, 4))
    assert (distance > 0.1).float().mean() > 0.8


def test_muon_takes_inner_kernels_only(vae):
    hidden = {name for name, p in vae.named_parameters() if is_hidden_convolution(name, p)}
    assert "decoder.mid_block.resnets.0.conv1.weight" in hidden
    assert not {"encoder.conv_in.weight", "decoder.conv_out.weight", "quant_conv.weight"} & hidden
